"""Hugging Face directories of OmniMoE: what is written, read back, taken over and refused."""

import ast
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.convert import main as convert
from tests.omni_directory import BIASED, EXPERTS, parts_of, settings, write_export
from tests.small_run import Silent, run, small_config
from titan_vlm import train
from titan_vlm.assembly import export
from titan_vlm.data.chat import rope_positions
from titan_vlm.errors import ConfigError
from titan_vlm.models.init import init_weights
from titan_vlm.models.inputs import Batch
from titan_vlm.models.moe.config import MoE, MoEConfig
from titan_vlm.models.omni.config import FLAVORS, with_settings
from titan_vlm.models.omni.export.modeling_titan_omni import (
    TitanOmniForConditionalGeneration,
)
from titan_vlm.models.omni.flops import flops
from titan_vlm.models.omni.hf import CODE, HFTensors, check_exportable, read_config, shapes
from titan_vlm.models.omni.plan import pipeline_units
from titan_vlm.models.projector import Projector
from titan_vlm.settings import build
from titan_vlm.stages import make_stages


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("omni") / "hf")


def copied(directory, target, **changes):
    """The same with changes to its config.json."""
    shutil.copytree(directory, target)
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | changes))
    return target


def test_its_code_imports_nothing_that_transformers_does_not_need():
    allowed = {"torch", "transformers", "numpy", "PIL"} | sys.stdlib_module_names
    for path in CODE.glob("*_titan_omni.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module] if node.level == 0 else []
                assert node.level == 0 or (CODE / f"{node.module}.py").is_file()
            else:
                continue
            assert {name.partition(".")[0] for name in names} <= allowed, path


def test_biases_keep_their_precision_in_a_bfloat16_export(written):
    directory, _, model = written
    name = "text.layers.0.moe.router.steering.bias_E"
    stored = load_file(directory / "model.safetensors")
    assert torch.equal(stored[name], model.get_buffer(name))
    assert stored["text.norm.weight"].dtype == torch.bfloat16
    theirs = TitanOmniForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16)
    bias_E = theirs.text.layers[0].moe.router.steering.bias_E
    assert torch.equal(bias_E, model.get_buffer(name).float())
    assert theirs.text.norm.weight.dtype == torch.bfloat16


def test_sections_that_are_left_out_are_as_the_directory_has_them(written):
    directory, parts, _ = written
    config = read_config(directory)
    assert config == parts.dims
    assert with_settings(config, MoE(), Projector()) == config
    other = with_settings(config, MoE(text=MoEConfig(z_loss=0.1)), Projector())
    assert (other.text.num_experts, other.text.moe.z_loss) == (4, 0.1)
    assert other.vision == config.vision
    assert other.text.moe == replace(config.text.moe, z_loss=0.1)
    assert other.text.moe.bias_update == "sign"  # what is not named stays
    shallow = with_settings(config, MoE(), Projector(depth=1))
    assert shallow.projector == replace(config.projector, depth=1)
    noted = with_settings(config, MoE(vision=MoEConfig(aux_loss=0.02)), Projector())
    assert noted.vision.moe == replace(config.vision.moe, aux_loss=0.02)


def test_a_run_goes_on_from_what_another_exported(tmp_path, written):
    start = {"checkpoint__export_hf": "true", "training__freeze": "vision"}
    state = train.prepare(small_config(tmp_path / "a", **settings(text=BIASED), **start))
    for _ in range(2):
        train.train_step(state, Silent())
    train.export_hf(state)
    before = {name: x.clone() for name, x in state.model.state_dict().items()}
    state.loader.close()
    torch.distributed.destroy_process_group()

    hf = str(tmp_path / "a" / "hf")
    more = {"model__name": "omni", "model__flavor": "hf", "model__hf_path": hf}
    more |= {"checkpoint__initial_load_path": hf, "moe__text__aux_loss": "0"}
    state = train.prepare(small_config(tmp_path / "b", **more))
    after = state.model.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert any(after[name].any() for name in after if name.endswith("bias_E"))
    state.loader.close()
    torch.distributed.destroy_process_group()


def test_a_dense_export_is_upcycled(tmp_path):
    dense = parts_of()
    model = dense.spec.build(dense.dims)
    init_weights(model, 0, 0.1)
    export(dense, model.state_dict(), tmp_path / "hf", "float32")
    moe = MoEConfig(experts=4, top_k=2, expert_width=192, upcycle_shards=2, shared_width=8)
    config = with_settings(dense.dims, MoE(text=moe), dense.dims.projector)
    made = dense.spec.build(config)
    dense.spec.load_hf(made, tmp_path / "hf", 0)
    down_EFD = made.text.layers["1"].moe.experts.down
    shards = model.text.layers["1"].mlp.down.weight.T.chunk(2)
    assert torch.equal(down_EFD[1], 2 * shards[1])
    assert torch.equal(made.vision.norm.bias, model.vision.norm.bias)
    shared = made.text.layers["1"].moe.shared.mlp
    assert shared.gate.weight.any() and not shared.down.weight.any()
    export(replace(dense, dims=config), made.state_dict(), tmp_path / "moe", "float32")
    assert read_config(tmp_path / "moe").text.moe == replace(moe, upcycle_shards=0)
    with pytest.raises(ConfigError, match=r"has experts \(text.layers.0.moe.experts"):
        dense.spec.load_hf(made, tmp_path / "moe", 0)


@pytest.mark.parametrize(
    ("branch", "moe"),
    [
        ("text", {"router": "random"}),
        ("projector", {"router": "balanced"}),
        ("text", {"router": "expert_choice", "capacity_factor": 1, "allow_noncausal": "true"}),
    ],
)
def test_routers_that_cannot_answer_are_refused_by_their_setting(branch, moe):
    parts = parts_of(**{branch: EXPERTS | moe})
    with pytest.raises(ConfigError, match=f'moe.{branch}.router = "{moe["router"]}"') as error:
        check_exportable(parts.dims)
    assert "\n" not in str(error.value)


def test_layers_asleep_are_refused():
    parts = parts_of(text=EXPERTS | {"asleep": "1"})
    with pytest.raises(ConfigError, match=r"moe.text.asleep = \[1\].*wakes them"):
        check_exportable(parts.dims)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("vision", {"num_positions": -4}, "vision num_positions must be at least 1, got -4"),
        ("vision", {"depth": 0}, "vision depth must be at least 1, got 0"),
        ("text", {"head_dim": -32}, "text head_dim must be at least 1, got -32"),
        ("text", {"mrope_section": (2, 7, 7)}, "cannot be interleaved"),
    ],
)
def test_dimensions_that_cannot_be_built_are_named(part, changes, words):
    config = FLAVORS["debug"]
    with pytest.raises(ConfigError, match=words):
        replace(config, **{part: replace(getattr(config, part), **changes)})


def test_a_cache_of_features_looks_at_the_directorys_tower(tmp_path, written):
    """Not at [moe.vision], which is left out with a directory."""
    directory, parts, _ = written
    frozen = {"training__freeze": "vision", "model__hf_path": str(directory)}
    frozen |= {"model__name": "omni", "model__flavor": "hf", "data__feature_cache": "cache"}
    config = small_config(tmp_path, **frozen, moe__text__aux_loss="0.0")
    make_stages(config, 1)
    vision = replace(parts.dims.vision.moe, noise="jitter")
    other = replace(parts.dims, vision=replace(parts.dims.vision, moe=vision))
    model = parts.spec.build(other)
    export(replace(parts, dims=other), model.state_dict(), tmp_path / "hf", "bfloat16")
    frozen["model__hf_path"] = str(tmp_path / "hf")
    with pytest.raises(ConfigError, match="expected moe.vision.noise = none"):
        make_stages(small_config(tmp_path, **frozen, moe__text__aux_loss="0.0"), 1)


def test_levels_out_of_use_cost_nothing_and_few_queries_mean_many_pictures():
    def of(**projector):
        projector = Projector(levels=["1:0", "2:1"], **projector)
        return with_settings(FLAVORS["debug"], MoE(), projector)

    grid = [(1, 8, 8)]
    per_level = flops(of(), [], grid) - flops(of(depth=1), [], grid)
    assert per_level > 0
    assert flops(of(depth=1), [], grid) - flops(of(depth=0), [], grid) == per_level
    first = [
        pipeline_units(of(reduction="resampler", positions="1d", tokens=n), 512)[0].cost
        for n in (8, 64)
    ]
    assert first[0] > 4 * first[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen3"}, "model_type must be titan_omni, got qwen3"),
        ({"text_config": {}}, "config.json: key 'moe' is missing"),
        ({"vision_config": 3}, "config.json has a value of a wrong type"),
        ({"tie_word_embeddings": "yes"}, "tie_embeddings must be a bool"),
    ],
)
def test_a_config_that_is_no_omnimoe_is_refused(tmp_path, written, changes, words):
    directory = copied(written[0], tmp_path / "hf", **changes)
    with pytest.raises(ConfigError, match=words) as error:
        read_config(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_named(tmp_path, written):
    directory, parts, _ = written
    tensors = load_file(directory / "model.safetensors")
    (tmp_path / "hf").mkdir()

    def refused(changed, words, dims=parts.dims):
        save_file(changed, tmp_path / "hf" / "model.safetensors")
        with pytest.raises(ConfigError, match=words) as error:
            HFTensors(tmp_path / "hf", dims)
        assert "\n" not in str(error.value)

    absent = {name: x for name, x in tensors.items() if name != "text.norm.weight"}
    refused(absent, "1 missing, the first text.norm.weight")
    refused(tensors | {"more": torch.zeros(2)}, "1 unexpected, the first more")
    refused(
        tensors | {"text.norm.weight": torch.zeros(3)},
        r"1 of another shape, the first text.norm.weight is \[3\] there and \[128\]",
    )
    unbiased = replace(parts.dims.text.moe, bias_update="none")
    dims = replace(parts.dims, text=replace(parts.dims.text, moe=unbiased))
    refused(tensors, "4 unexpected, the first .*bias_E", dims)


def test_a_router_begins_anew_where_the_directory_has_no_biases(tmp_path, written):
    directory, parts, _ = written
    tensors = load_file(directory / "model.safetensors")
    (tmp_path / "hf").mkdir()
    kept = {name: x for name, x in tensors.items() if not name.endswith("bias_E")}
    save_file(kept, tmp_path / "hf" / "model.safetensors")
    model = parts.spec.build(parts.dims)
    parts.spec.load_hf(model, tmp_path / "hf")
    assert not model.get_buffer("text.layers.0.moe.router.steering.bias_E").any()


def test_other_settings_than_the_directorys_are_said(written, caplog):
    directory, parts, _ = written
    moe = replace(parts.dims.text.moe, route_scale=2.0)
    dims = replace(parts.dims, text=replace(parts.dims.text, moe=moe))
    parts.spec.load_hf(parts.spec.build(dims), directory)
    assert "trained with moe.text.route_scale = 1.0; the model has 2.0" in caplog.text
    caplog.clear()
    parts.spec.load_hf(parts.spec.build(parts.dims), directory)
    assert "trained with" not in caplog.text


def test_convert_writes_checkpoints_and_other_types(tmp_path):
    assert run(tmp_path / "run", training__steps="3", **settings(text=BIASED)) == 0
    source = tmp_path / "run" / "checkpoints" / "step-000003"
    assert convert([str(source), str(tmp_path / "a"), "--dtype", "float32"]) == 0
    ours = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    again = load_file(tmp_path / "a" / "model.safetensors")
    assert ours.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in ours.items())
    assert convert([str(tmp_path / "a"), str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    rounded = load_file(tmp_path / "b" / "model.safetensors")
    parameters, _ = shapes(read_config(tmp_path / "b"))
    assert {x.dtype for name, x in rounded.items() if name in parameters} == {torch.bfloat16}
    bias = next(name for name in ours if name.endswith("bias_E"))
    assert torch.equal(ours[bias], rounded[bias])
    assert (tmp_path / "b" / "modeling_titan_omni.py").is_file()


def test_convert_refuses_other_balancing_than_the_checkpoints(tmp_path, capsys):
    biased = settings(text=BIASED)
    assert run(tmp_path / "run", training__steps="3", checkpoint__export_hf="false", **biased) == 0
    source = tmp_path / "run" / "checkpoints" / "step-000003"
    toml = tmp_path / "other.toml"
    content = (tmp_path / "run" / "config.toml").read_text()
    toml.write_text(content.replace('bias_update = "sign"', 'bias_update = "none"'))
    words = [str(source), str(tmp_path / "hf"), "--config", str(toml)]
    assert convert(words) == 2
    assert "bias_E, which a model of this configuration has not" in capsys.readouterr().err


@pytest.mark.parametrize(
    "projector",
    [
        {"levels": "1:0,pooled:1"},
        {"levels": "2:1,pooled:0", "reduction": "qformer", "tokens": 3, "positions": "1d"},
    ],
    ids=["merge", "qformer"],
)
def test_a_video_counts_frame_by_frame_in_both(tmp_path, projector):
    """The processor cuts no video, but the model takes one, as it takes pictures."""
    choice = EXPERTS | {"router": "expert_choice", "capacity_factor": 1}
    parts = parts_of(vision=choice, projector=choice)
    dims = with_settings(
        parts.dims,
        MoE(vision=parts.dims.vision.moe, projector=parts.dims.projector_moe),
        build(Projector, projector | {"levels": projector["levels"].split(",")}, "test"),
    )
    model = parts.spec.build(dims)
    init_weights(model, 0, 0.1)
    model.double().eval()
    export(replace(parts, dims=dims), model.state_dict(), tmp_path / "hf", "float64")
    theirs = TitanOmniForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float64)

    grids = [(2, 4, 6), (1, 6, 2)]
    sizes = [(1, dims.queries) if dims.queries else (h // 2, w // 2) for _, h, w in grids]
    pads, tokens, starts = [dims.video_token_id] * 2 + [dims.image_token_id], [5, 6], []
    blocks = [sizes[0], sizes[0], sizes[1]]
    for pad, (height, width) in zip(pads, blocks, strict=True):
        starts.append(len(tokens))
        tokens += [pad] * (height * width) + [7, 8]
    places = np.tile(np.arange(len(tokens)), (3, 1))
    if dims.projector.positions == "mrope":
        places = rope_positions(len(tokens), starts, blocks)
    tokens_BS = torch.tensor([tokens])
    visual = (tokens_BS == dims.video_token_id) | (tokens_BS == dims.image_token_id)
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.rand(patches, dims.vision.patch_dim, generator=torch.Generator().manual_seed(1))
    batch = Batch(
        tokens_BS,
        tokens_BS,
        torch.from_numpy(places)[:, None],
        torch.ones_like(visual),
        [len(tokens)],
        pixels,
        grids,
        visual.flatten().nonzero().squeeze(-1),
    )
    with torch.no_grad():
        ours = model(batch)
        out = theirs(tokens_BS, pixel_values=pixels, image_grid_thw=torch.tensor(grids)).logits
    assert (out - ours).abs().max() < 1e-10 * ours.abs().max()
