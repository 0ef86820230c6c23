"""OmniMoE assembled from transformers' towers answers texts as the language model it came from.

transformers saves a random Qwen3 and SigLIP2, `load_parts` reads them. The reference runs document
by document, ours packed rows; in float64 transformers' casts to float32 are lifted.

    type       logits    gradients of the dense decoder
    float32    1e-5      1e-4
    float64    1e-10     1e-9
"""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2Config,
    Siglip2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from scripts.hf_reference import everything_float64
from tests.small_run import Silent, small_config
from titan_vlm import train
from titan_vlm.errors import ConfigError
from titan_vlm.models.inputs import IGNORE_LABEL, Batch
from titan_vlm.models.layers.head import whole
from titan_vlm.models.moe.config import MoE, MoEConfig
from titan_vlm.models.omni.config import OmniConfig, with_settings
from titan_vlm.models.omni.model import Omni
from titan_vlm.models.omni.parts import _text_name, load_parts, read_parts_config
from titan_vlm.models.projector import Projector

TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-10, 1e-9)}
LENS = (9, 1, 14, 6)
QWEN3 = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}
SIGLIP2 = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 16,
    "num_patches": 36,
}


def randomized(model):
    """As large as trained weights, so that no part of the model can be forgotten."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(0, 0.15, generator=generator)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def language(request, tmp_path_factory):
    """The directory of a dense Qwen3."""
    directory = tmp_path_factory.mktemp("qwen3")
    config = Qwen3Config(**QWEN3, tie_word_embeddings=request.param)
    randomized(Qwen3ForCausalLM(config)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """The directory of a SigLIP2 with both of its towers."""
    directory = tmp_path_factory.mktemp("siglip2")
    text = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "projection_size": 48}
    config = Siglip2Config(text_config=text, vision_config=SIGLIP2)
    randomized(Siglip2Model(config)).save_pretrained(directory)
    return directory


def assembled(tower, language, dtype, text: MoEConfig | None = None, seed=0, **parts) -> Omni:
    config = read_parts_config(tower, language)
    moe = MoE(text=text or MoEConfig(), **parts)
    config = with_settings(config, moe, Projector(levels=["1:0", "pooled:1"]))
    model = Omni(config).to(dtype)
    load_parts(model, tower, language, seed)
    return model.train()


def reference(language, dtype):
    with everything_float64() if dtype == torch.float64 else torch.enable_grad():
        model = Qwen3ForCausalLM.from_pretrained(language, dtype=dtype, attn_implementation="sdpa")
        rope = model.model.rotary_emb  # in no file, and made before the cast
        rope.inv_freq, _ = rope.compute_default_rope_parameters(model.config)
    return model


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 500, (size,), generator=generator) for size in LENS]


def packed() -> Batch:
    tokens_BS = torch.cat(documents())[None]
    positions_S = torch.cat([torch.arange(size) for size in LENS])
    labels_BS = torch.cat([F.pad(d[1:], (0, 1), value=IGNORE_LABEL) for d in documents()])[None]
    return Batch(
        tokens_BS,
        labels_BS,
        positions_S.expand(3, 1, -1),
        torch.ones_like(tokens_BS, dtype=torch.bool),
        list(LENS),
        torch.zeros(0, 3 * 16**2),
        [],
        torch.zeros(0, dtype=torch.int64),
    )


def loss_of(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV, labels_T, reduction="sum")


def answers(model, dtype) -> Tensor:
    """[T, V] of all documents, each by itself; gradients stay in `model`."""
    logits, labels = [], packed().labels_BS[0].split(LENS)
    for tokens, label in zip(documents(), labels, strict=True):
        with everything_float64() if dtype == torch.float64 else torch.enable_grad():
            out = model(tokens[None], use_cache=False).logits[0]
            loss_of(out, label).backward()
        logits.append(out.detach())
    return torch.cat(logits)


def error(a: Tensor, b: Tensor, floor: float = 1e-6) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=floor)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_dense_decoder_equals_transformers_in_logits_and_gradients(tower, language, dtype):
    for_logits, for_gradients = TOLERANCE[dtype]
    ours, theirs = assembled(tower, language, dtype), reference(language, dtype)
    wanted = answers(theirs, dtype)
    logits_TV = ours(packed())[0]
    assert error(logits_TV.detach(), wanted) < for_logits
    loss_of(logits_TV, packed().labels_BS[0]).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    compared = {name for name, _ in ours.named_parameters() if not name.startswith(("v", "p"))}
    for name in compared:
        gradient = gradients.pop(_text_name(name))
        assert error(ours.get_parameter(name).grad, gradient) < for_gradients, name
    assert not gradients  # every one of theirs was compared


@pytest.mark.parametrize(
    "moe",
    [
        {"experts": 4, "top_k": 2, "expert_width": 96, "upcycle_shards": 1},
        {"experts": 8, "top_k": 4, "expert_width": 48, "upcycle_shards": 2, "layers": [1, 2]},
        {"experts": 4, "top_k": 1, "expert_width": 96, "upcycle_shards": 1, "shared_width": 40},
    ],
    ids=["copies", "shards", "with a shared expert"],
)
def test_upcycled_experts_answer_as_the_dense_model(tower, language, moe):
    vision = MoEConfig(experts=4, top_k=1, expert_width=32, layers=[2])
    projector = MoEConfig(experts=4, top_k=2, expert_width=32)
    ours = assembled(
        tower, language, torch.float64, MoEConfig(**moe), vision=vision, projector=projector
    )
    wanted = answers(reference(language, torch.float64), torch.float64)
    assert any("moe" in name for name, _ in ours.text.named_parameters())
    assert error(ours(packed())[0].detach(), wanted) < 1e-10


def test_noise_changes_the_answers_by_about_its_size(tower, language):
    moe = MoEConfig(experts=4, top_k=2, expert_width=96, upcycle_shards=1, upcycle_noise=0.01)
    ours = assembled(tower, language, torch.float64, moe)
    wanted = answers(reference(language, torch.float64), torch.float64)
    assert 1e-4 < error(ours(packed())[0].detach(), wanted) < 0.05


def test_what_no_part_has_is_drawn_from_the_seed(tower, language):
    moe = MoEConfig(experts=4, top_k=2, expert_width=96, upcycle_shards=1)
    vision = MoEConfig(experts=4, top_k=1, expert_width=32, layers=[2])
    first, again, other = (
        dict(assembled(tower, language, torch.float32, moe, seed, vision=vision).named_parameters())
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    differs = {name for name, p in first.items() if not torch.equal(p, other[name])}
    matrices = {name for name, p in first.items() if p.ndim > 1}
    own = {name for name in matrices if name.startswith("projector.") or ".moe.router" in name}
    assert differs == own | {name for name in matrices if name.startswith("vision.blocks.2.moe.")}


def test_dimensions_are_those_of_the_directories(tower, language):
    config = read_parts_config(tower, language)
    text, vision = config.text, config.vision
    assert (text.rope_theta, text.mrope_section, text.head_dim) == (50_000.0, (4, 2, 2), 16)
    assert (vision.depth, vision.naflex, vision.num_positions) == (3, True, 36)
    assert config.tie_embeddings == json.loads((language / "config.json").read_text()).get(
        "tie_word_embeddings"
    )
    assert isinstance(replace(config, projector=Projector(levels=["2:0"])), OmniConfig)


def test_a_tower_of_fixed_resolution_is_read_too(tmp_path, language):
    dims = {key: value for key, value in SIGLIP2.items() if key != "num_patches"}
    reference = randomized(SiglipVisionModel(SiglipVisionConfig(**dims, image_size=64)))
    reference.save_pretrained(tmp_path)
    model = assembled(tmp_path, language, torch.float32)
    assert (model.config.vision.naflex, model.config.vision.num_positions) == (False, 16)
    bias = dict(reference.named_parameters())
    name = next(name for name in bias if name.endswith("post_layernorm.bias"))
    assert torch.equal(model.vision.norm.bias, bias[name])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "qwen2", "model_type must be qwen3, got qwen2"),
        ("attention_bias", True, "attention_bias must be absent"),
        ("use_sliding_window", True, "use_sliding_window must be absent"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}, "got yarn"),
        ("hidden_size", None, "hidden_size must be an? int, got None"),
    ],
)
def test_a_decoder_of_another_kind_is_refused(tmp_path, tower, language, key, value, words):
    config = json.loads((language / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words) as error:
        read_parts_config(tower, tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_key_names_the_setting_the_directory_and_the_key(tmp_path, tower):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "rope_theta": 1}')
    with pytest.raises(ConfigError, match=rf"model.text_path = {tmp_path}: .*head_dim|hidden_size"):
        read_parts_config(tower, tmp_path)


def changes(tower, language, **more):
    settings = {"name": "omni", "flavor": "parts", "vision_path": tower, "text_path": language}
    named = {f"model__{key}": str(value) for key, value in settings.items()}
    return named | {"checkpoint__export_hf": "false", "training__dtype": "float64"} | more


def test_a_run_starts_from_the_parts_and_trains(tmp_path, tower, language):
    config = small_config(
        tmp_path,
        **changes(tower, language),
        projector__levels="1:0",
        moe__text__experts="4",
        moe__text__top_k="2",
        moe__text__expert_width="96",
        moe__text__upcycle_shards="1",
    )
    run = train.prepare(config)
    weights = {name: whole(p.detach()).clone() for name, p in run.model.named_parameters()}
    expected = dict(assembled(tower, language, torch.float64).named_parameters())
    assert torch.equal(weights["text.embed.weight"], expected["text.embed.weight"])
    assert torch.equal(weights["vision.norm.weight"], expected["vision.norm.weight"])
    train.train_step(run, Silent())
    after = run.model.get_parameter("text.layers.0.moe.experts.down")
    assert not torch.equal(whole(after.detach()), weights["text.layers.0.moe.experts.down"])
    run.loader.close()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model__flavor": "debug"}, "model.vision_path: expected a directory with flavor"),
        ({"model__text_path": ""}, "model.text_path: expected a directory with flavor"),
        ({"checkpoint__initial_load_path": "x"}, "initial_load_path: expected none"),
        (
            {"moe__text__experts": "4", "moe__text__top_k": "1", "moe__text__expert_width": "8"},
            "moe.text.upcycle_shards: expected 1 or more",
        ),
        (
            {
                "moe__vision__experts": "4",
                "moe__vision__top_k": "1",
                "moe__vision__expert_width": "8",
            },
            "moe.vision.upcycle_shards: expected 1 or more",
        ),
    ],
)
def test_settings_that_do_not_go_with_parts_are_refused(tmp_path, tower, language, more, words):
    with pytest.raises(ConfigError, match=words):
        small_config(tmp_path, **(changes(tower, language) | more))


def test_a_family_without_parts_says_so(tmp_path, tower, language):
    config = small_config(tmp_path, **changes(tower, language, model__name="qwen3_vl"))
    with pytest.raises(ConfigError, match="model.flavor = 'parts': expected one of"):
        train.prepare(config)


# ------------------------------------------------------------------------------- vision experts


def pictures(model) -> Batch:
    vision = model.config.vision
    grids = [(1, 4, 6), (1, 2, 2)]
    pixels = torch.randn(28, vision.patch_dim, generator=torch.Generator().manual_seed(4))
    none = torch.zeros(1, 0, dtype=torch.int64)
    return Batch(none, none, none.expand(3, 1, 0), none.bool(), [], pixels.double(), grids, none[0])


GELU = {"activation": "gelu", "expert_bias": True, "layers": "deep_half"}


@pytest.mark.parametrize(
    ("shards", "experts", "top_k"), [(1, 3, 1), (1, 4, 2), (2, 4, 2), (4, 8, 4)]
)
def test_an_upcycled_tower_sees_what_the_dense_one_sees(tower, language, shards, experts, top_k):
    moe = MoEConfig(
        experts=experts, top_k=top_k, expert_width=80 // shards, upcycle_shards=shards, **GELU
    )
    dense = assembled(tower, language, torch.float64)
    sparse = assembled(tower, language, torch.float64, vision=moe)
    assert [hasattr(b, "moe") for b in sparse.vision.blocks.values()] == [False, True, True]
    seen, wanted = sparse.vision(pictures(sparse)), dense.vision(pictures(dense))
    for scale, value in wanted.items():
        torch.testing.assert_close(seen[scale], value, rtol=1e-12, atol=1e-12)
    loads = [block.moe.router.load_E for block in list(sparse.vision.blocks.values())[1:]]
    assert all(load.sum() == 28 * top_k for load in loads)
    ups = sparse.vision.blocks["2"].moe.experts.up
    assert torch.equal(ups[0], ups[shards]) and (shards == 1 or not torch.equal(ups[0], ups[1]))


def test_noise_sets_the_experts_of_a_tower_apart(tower, language):
    moe = MoEConfig(
        experts=3, top_k=1, expert_width=80, upcycle_shards=1, upcycle_noise=0.1, **GELU
    )
    first, again = (assembled(tower, language, torch.float64, vision=moe) for _ in range(2))
    experts, same = (model.vision.blocks["1"].moe.experts for model in (first, again))
    assert torch.equal(experts.up, same.up) and torch.equal(experts.down, same.down)
    assert not torch.equal(experts.up[0], experts.up[1])
    assert torch.equal(experts.up_bias[0], experts.up_bias[1])
    dense = assembled(tower, language, torch.float64).vision.blocks["1"].mlp.up.weight
    noise = (experts.up[0].t() - dense).detach()
    assert (noise.std() / dense.square().mean().sqrt()).item() == pytest.approx(0.1, rel=0.05)


def test_shards_that_are_not_the_towers_layers_are_refused(tower, language):
    moe = MoEConfig(experts=4, top_k=2, expert_width=50, upcycle_shards=2, **GELU)
    with pytest.raises(ConfigError, match=r"moe.vision.expert_width: 50 in 2 .* expected 40"):
        assembled(tower, language, torch.float64, vision=moe)
