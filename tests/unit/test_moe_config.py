"""[moe]: what is refused, in words; and what a model is made of."""

import pytest

from tests.small_run import small_config
from titan_vlm.assembly import assemble
from titan_vlm.config import Config, config_to_toml, load_config
from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import MoEConfig, chosen_layers
from titan_vlm.models.moe.layer import moe_layers
from titan_vlm.settings import leaves

VISION = {"moe__vision__experts": "4", "moe__vision__top_k": "1", "moe__vision__expert_width": "32"}
REFUSED = {
    "a decoder that sees the future": (
        {"router": "expert_choice", "capacity_factor": "1"},
        "allow_noncausal = true",
    ),
    "expert choice without capacity": (
        {"router": "expert_choice", "allow_noncausal": "true"},
        "capacity_factor: expected above 0",
    ),
    "top-k scores without top-k": (
        {"router": "threshold", "score": "softmax_topk"},
        'use "softmax" or "sigmoid"',
    ),
    "learned noise": ({"router": "noisy_topk"}, 'score: expected "softmax_topk"'),
    "noise that nothing reads": ({"router": "random", "noise": "jitter"}, 'not with "random"'),
    "rsample of experts": (
        {
            "router": "expert_choice",
            "capacity_factor": "1",
            "allow_noncausal": "true",
            "noise": "rsample",
        },
        "tokens choose there",
    ),
    "a bias on what is not chosen": (
        {"router": "threshold", "bias_update": "sign"},
        'needs router = "topk", got "threshold"',
    ),
    "a bias on a softmax over the chosen": (
        {"score": "softmax_topk", "bias_update": "sign"},
        "needs scores of all experts",
    ),
    "quantile and a loss": (
        {"bias_update": "quantile", "aux_loss": "0.1"},
        "aux_loss: expected 0",
    ),
    "groups of another router": ({"router": "random", "n_groups": "2"}, "n_groups = 2"),
    "more groups than there are": (
        {"n_groups": "2", "topk_groups": "3"},
        "topk_groups: expected at most n_groups (2), got 3",
    ),
    "groups that do not divide": ({"n_groups": "3"}, "expected a divisor of the 8 experts, got 3"),
    "groups too small for k": (
        {"n_groups": "8", "topk_groups": "1"},
        "1 of 8 groups hold 1 experts, a token needs 2",
    ),
    "a load without noise": ({"cv_load": "0.1"}, 'cv_load: needs router = "noisy_topk"'),
    "a gate for nothing": ({"shared_gate": "true"}, "set shared_width"),
    "layers twice": ({"layers": "1,2", "every": "2"}, "every = 2: expected 0"),
    "a decoder whose drops see the future": (
        {"capacity_factor": "1", "drop": "score"},
        'use "position", or set allow_noncausal = true',
    ),
    "a layer twice": ({"layers": "1,1"}, "layers: expected each once, got [1, 1]"),
    "words that are none": (
        {"layers": "deep"},
        'expected all|deep_half or list of int >= 0, got ["deep"]',
    ),
    "a half and every other": ({"layers": "deep_half", "every": "2"}, "every = 2: expected 0"),
    "a step beyond the last layer": ({"every": "9"}, "every = 9: there are 4 layers"),
    "more experts than there are": ({"top_k": "99"}, "top_k: expected at most the 8 experts"),
    "a chunk of nothing": ({"ec_chunk": "4"}, 'ec_chunk: does nothing without router = "expert_'),
    "drops that do not happen": (
        {"drop": "score", "allow_noncausal": "true"},
        "drop: does nothing",
    ),
    "a speed that nothing has": ({"bias_speed": "0.1"}, "bias_speed: does nothing without"),
    "options of no library": ({"fused.num_sms": "8"}, "fused: does nothing without dispatcher"),
    "a curve of nothing": (
        {"anneal.z_loss": "{ 0 = 1.0 }"},
        "anneal.z_loss: the coefficient z_loss is 0",
    ),
    "layers that are not there": ({"layers": "1,9"}, "moe.text.layers: [9] of 4 layers"),
    "experts without dimensions": ({"experts": "4"}, "set top_k and expert_width"),
    "a curve of words": ({"anneal.aux_loss": "{ soon = 1.0 }"}, "expected steps as keys"),
}


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("all", [0, 1, 2, 3]), ("deep_half", [2, 3]), ("0,3", [0, 3]), ("[1]", [1])],
)
def test_layers_with_experts_are_listed_or_named(layers, chosen, tmp_path):
    changes = {"moe__text__layers": layers, "moe__vision__layers": layers}
    changes |= VISION
    dims = assemble(small_config(tmp_path, **changes)).dims
    assert [i for i in range(4) if dims.text.is_moe_layer(i)] == chosen
    assert list(dims.vision.moe_layers) == chosen
    again = load_config(str(write(tmp_path, small_config(tmp_path, **changes))))
    assert again.moe.text.layers == small_config(tmp_path, **changes).moe.text.layers


def write(folder, config):
    path = folder / "again.toml"
    path.write_text(config_to_toml(config))
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_by_its_key(name, tmp_path):
    settings, words = REFUSED[name]
    changes = {f"moe__text__{key.replace('.', '__')}": value for key, value in settings.items()}
    with pytest.raises(ConfigError) as error:
        assemble(small_config(tmp_path, **changes))
    assert words in str(error.value)
    assert "moe.text" in str(error.value)
    assert "\n" not in str(error.value)


def test_pictures_need_dimensions_for_their_experts(tmp_path):
    with pytest.raises(ConfigError, match="moe.vision.experts = 4: set top_k and expert_width"):
        small_config(tmp_path, moe__vision__experts="4")
    with pytest.raises(ConfigError, match="moe.vision.experts: expected a number"):
        small_config(tmp_path, moe__vision__top_k="1", moe__vision__expert_width="8")


@pytest.mark.parametrize("key", ["layers", "every"])
def test_what_the_projector_refuses_its_help_does_not_promise(key, tmp_path):
    experts = {key.replace("vision", "projector"): value for key, value in VISION.items()}
    with pytest.raises(ConfigError, match=rf"^moe.projector.{key} = .*all mergers have experts"):
        assemble(small_config(tmp_path, **experts, **{f"moe__projector__{key}": "2"}))
    told = dict(leaves(Config))[f"moe.projector.{key}"].metadata["text"]
    assert told.startswith("text, vision: ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe__vision__aux_loss": "0.1"}, "moe.vision.aux_loss: this model has no experts there"),
        ({"moe__projector__z_loss": "0.1"}, "moe.projector.z_loss: this model has no experts"),
        (
            {"moe__text__score": "sigmoid", "model__flavor": "debug"},
            "moe.text.score: this model has no experts there",
        ),
    ],
)
def test_settings_of_experts_that_are_not_there_are_refused(changes, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        assemble(small_config(tmp_path, **changes))
    assert words in str(error.value)


def test_layers_by_list_by_step_and_all():
    assert chosen_layers(MoEConfig(layers=[0, 3]), 6) == (0, 3)
    assert chosen_layers(MoEConfig(every=2), 6) == (1, 3, 5)
    assert chosen_layers(MoEConfig(), 3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, ["text.layers.1", "text.layers.2", "text.layers.3"]),
        ({"moe__text__layers": "0,2"}, ["text.layers.0", "text.layers.2"]),
        ({"moe__text__every": "2"}, ["text.layers.1", "text.layers.3"]),
        ({"moe__text__experts": "0"}, []),
        (
            VISION | {"moe__vision__layers": "1", "moe__text__experts": "0"},
            ["vision.blocks.1"],
        ),
        (
            {
                "moe__text__experts": "0",
                "moe__projector__experts": "2",
                "moe__projector__top_k": "1",
                "moe__projector__expert_width": "8",
            },
            ["vision.merger", "vision.deepstack_mergers.0", "vision.deepstack_mergers.1"],
        ),
    ],
)
def test_experts_are_in_the_layers_that_were_asked_for(changes, layers, tmp_path):
    parts = assemble(small_config(tmp_path, **changes))
    assert list(moe_layers(parts.spec.build(parts.dims))) == layers


def test_experts_have_the_dimensions_that_were_asked_for(tmp_path):
    changes = {"moe__text__experts": "6", "moe__text__top_k": "3", "moe__text__expert_width": "24"}
    parts = assemble(small_config(tmp_path, **changes, moe__text__shared_width="40"))
    layer = moe_layers(parts.spec.build(parts.dims))["text.layers.1"]
    assert layer.experts.gate_up.shape == (6, 128, 48)
    assert layer.router.top_k == 3
    assert layer.shared.mlp.up.weight.shape == (40, 128)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe__text__score": "sigmoid"},
        {"moe__text__bias_update": "sign"},
        {"moe__text__shared_width": "32"},
        {"moe__text__expert_bias": "true"},
        {"moe__text__router": "threshold"},
        {"moe__text__router": "noisy_topk", "moe__text__score": "softmax_topk"},
        {"moe__text__router": "random"},
        {"moe__text__router": "balanced"},
        {"moe__text__normalize": "false"},
        {"moe__text__route_scale": "2.0"},
        {"moe__text__n_groups": "2", "moe__text__topk_groups": "1"},
        VISION,
        {key.replace("vision", "projector"): value for key, value in VISION.items()},
    ],
)
def test_what_transformers_cannot_compute_is_not_exported(changes, tmp_path):
    """The message names the one key and its value."""
    from titan_vlm import train

    with pytest.raises(ConfigError, match="Hugging Face format has no") as error:
        train.prepare(small_config(tmp_path, **changes))
    (key, value), *_ = changes.items()
    setting = f"{key.replace('__', '.')} = "
    assert f"({setting}{value})" in str(error.value).replace('"', "")
    assert str(error.value).count("moe.") == 1


def test_a_setting_with_weights_is_named_before_one_without(tmp_path):
    parts = assemble(
        small_config(tmp_path, moe__text__score="sigmoid", moe__text__shared_width="8")
    )
    with pytest.raises(ConfigError, match=r"no shared expert \(moe.text.shared_width = 8\)"):
        parts.spec.check_exportable(parts.dims)


def test_a_checkpoint_without_the_experts_is_refused(tmp_path):
    from titan_vlm.models.qwen3_vl.hf import HFTensors

    parts = assemble(small_config(tmp_path, **VISION))
    with pytest.raises(
        ConfigError, match=r"has no experts in the vision \(moe.vision.experts = 4\)"
    ):
        HFTensors(tmp_path, parts.dims)
