"""Hugging Face directories: names, both expert layouts, refusals, exact round trips."""

import copy
import json
import logging
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3VLMoeConfig

from scripts.hf_reference import (
    ask_ours,
    ask_reference,
    load_reference,
    make_document,
    new_reference,
    pack,
    random_picture,
    tiny_config,
)
from tests.hf_directory import (
    DOWN_SQUARE,
    EXPERTS,
    GATE_UP_SQUARE,
    NO_SQUARE,
    assert_same,
    build,
    refusal,
    rewrite,
    saver,
    tensors,
)
from titan_vlm.data.tokenizer import load_tokenizer, visual_token_ids
from titan_vlm.errors import ConfigError
from titan_vlm.models.qwen3_vl.config import FLAVORS, from_hf, to_hf, with_token_ids
from titan_vlm.models.qwen3_vl.hf import (
    HFTensors,
    default_layout,
    links,
    load_hf,
    read_config,
)
from titan_vlm.models.qwen3_vl.model import Qwen3VL
from titan_vlm.models.registry import model_config, model_spec
from titan_vlm.models.safetensors_io import INDEX
from titan_vlm.models.shards import copy_into


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def save(tmp_path):
    return saver(tmp_path)


# ------------------------------------------------------------------------- names and dimensions


@pytest.mark.parametrize("flavor", FLAVORS)
def test_every_flavor_has_the_tensors_of_transformers_model(flavor):
    import transformers

    config = FLAVORS[flavor]
    hf = to_hf(config)
    assert from_hf(json.loads(json.dumps(hf))) == config
    dims = {k: hf[k] for k in hf if k not in ("model_type", "architectures", "dtype")}
    kind = hf["architectures"][0].removesuffix("ForConditionalGeneration")
    with torch.device("meta"):
        model = getattr(transformers, hf["architectures"][0])(
            getattr(transformers, f"{kind}Config")(**dims)
        )
    ours = links(config, dict.fromkeys(range(config.text.num_layers), "transformers"))
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {link.theirs: link.their_shape for link in ours} == theirs


def test_flavors_have_the_published_number_of_parameters():
    published = {
        "2b": 2_127_532_032,
        "4b": 4_437_815_808,
        "8b": 8_767_123_696,
        "32b": 33_357_390_064,
        "30b-a3b": 31_070_754_032,
        "235b-a22b": 235_670_022_896,
    }
    for flavor, count in published.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in Qwen3VL(FLAVORS[flavor]).parameters()) == count, flavor


def test_unknown_model_and_flavor_name_the_nearest():
    with pytest.raises(ConfigError, match="model.name = 'qwen3vl'.*'qwen3_vl'"):
        model_spec("qwen3vl")
    with pytest.raises(ConfigError, match="model.flavor = '30b_a3b'.*'30b-a3b'"):
        model_config("qwen3_vl", "30b_a3b")


def test_flavor_hf_takes_the_dimensions_of_a_directory(tmp_path):
    config = tiny_config(moe=True)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
    assert model_config("qwen3_vl", "hf", str(tmp_path)) == config
    with pytest.raises(ConfigError, match="model.hf_path = .*nowhere"):
        model_config("qwen3_vl", "hf", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mrope_section": (4, 6, 6)}, r"mrope_section \[4, 6, 6\] cannot .* e.g. \[6, 5, 5\]"),
        ({"mrope_section": (16,)}, r"mrope_section \[16\] cannot be interleaved"),
        ({"mrope_section": (6, 5, 5, 0)}, r"mrope_section \[6, 5, 5, 0\] cannot be interleaved"),
        ({"mrope_section": (18, -1, -1)}, r"mrope_section \[18, -1, -1\] cannot be interleaved"),
        ({"mrope_section": (4, 5, 5)}, r"mrope_section .* must sum to head_dim / 2 = 16"),
        ({"num_kv_heads": 0}, "num_key_value_heads 0"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok 9 must lie in 1..num_experts 8"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step 0 must be at least 1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size 0 must be at least 1"),
    ],
)
def test_dimensions_that_cannot_be_built_are_refused_by_name(changes, said):
    debug = FLAVORS["debug_moe"]
    with pytest.raises(ConfigError, match=said):
        replace(debug, text=replace(debug.text, **changes))


@pytest.mark.parametrize("key", ["mrope_interleaved", "norm_topk_prob"])
def test_a_checkpoint_that_computes_something_else_is_refused(tmp_path, key):
    hf = to_hf(tiny_config(moe=True))
    text = hf["text_config"]
    (text if key in text else text["rope_parameters"])[key] = False
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ConfigError, match=f"{key} must be true.* choose another checkpoint"):
        model_config("qwen3_vl", "hf", str(tmp_path))


def test_the_rotary_base_of_the_vision_tower_survives_and_reaches_transformers():
    config = tiny_config(moe=True)
    config = replace(config, vision=replace(config.vision, rope_theta=500.0))
    assert from_hf(to_hf(config)) == config
    theirs = Qwen3VLMoeConfig(**to_hf(config)).vision_config
    assert theirs.rope_parameters["rope_theta"] == 500.0


def test_the_rotary_base_of_the_vision_tower_is_found_wherever_transformers_finds_it():
    hf = to_hf(tiny_config(moe=True))
    rope = {"rope_type": "default", "rope_theta": 600.0}
    for place in ({"rope_theta": 500.0}, {"rope_parameters": rope}):
        hf["vision_config"] |= place
        theirs = Qwen3VLMoeConfig(**copy.deepcopy(hf)).vision_config.rope_parameters
        assert from_hf(hf).vision.rope_theta == theirs["rope_theta"] != 10_000.0
    rope["rope_type"] = "yarn"
    with pytest.raises(ConfigError, match="vision rope_type must be axial, got yarn"):
        from_hf(hf)


def test_an_export_says_which_readers_ignore_the_rotary_base_of_the_vision_tower(save, caplog):
    config = tiny_config(moe=False)
    save(build(config))
    assert not caplog.messages
    directory = save(build(replace(config, vision=replace(config.vision, rope_theta=500.0))))
    assert [m for m in caplog.messages if f"{directory}: vision rope_theta = 500.0" in m]


# ------------------------------------------------------------------------------ expert layouts


@pytest.mark.parametrize("hidden", [NO_SQUARE, GATE_UP_SQUARE, DOWN_SQUARE])
@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_either_layout_is_written_and_told_apart(save, hidden, layout):
    model = build(tiny_config(moe=True, moe_intermediate_size=hidden))
    directory = save(model, layout=layout)
    gate_up, down = model.text.layers["0"].moe.experts.parameters()
    written = tensors(directory)
    turn = (lambda x: x) if layout == "published" else (lambda x: x.transpose(1, 2))
    assert torch.equal(written[f"{EXPERTS}.gate_up_proj"], turn(gate_up))
    assert torch.equal(written[f"{EXPERTS}.down_proj"], turn(down))

    read = build(model.config, seed=1)
    load_hf(read, directory)
    assert_same(read.state_dict(), model.state_dict())
    assert set(HFTensors(directory, model.config).layouts.values()) == {layout}


@pytest.mark.parametrize("hidden", [NO_SQUARE, GATE_UP_SQUARE, DOWN_SQUARE])
def test_transformers_reads_the_default_layout_correctly(save, hidden):
    model = build(tiny_config(moe=True, moe_intermediate_size=hidden))
    reference = load_reference(save(model), torch.float32)
    experts = reference.model.language_model.layers[0].mlp.experts
    gate_up, down = model.text.layers["0"].moe.experts.parameters()
    assert torch.equal(experts.gate_up_proj, gate_up.transpose(1, 2))
    assert torch.equal(experts.down_proj, down.transpose(1, 2))


@pytest.mark.parametrize("hidden", [GATE_UP_SQUARE, DOWN_SQUARE])
def test_transformers_misreads_a_square_tensor_of_the_published_layout(save, hidden, caplog):
    """Why the default is another one there; should this fail, `default_layout` can be simpler."""
    model = build(tiny_config(moe=True, moe_intermediate_size=hidden))
    assert default_layout(model.config) == "transformers"
    reference = load_reference(save(model, layout="published"), torch.float32)
    assert "published" in caplog.text  # whoever asks for it is warned
    experts = reference.model.language_model.layers[0].mlp.experts
    gate_up, down = model.text.layers["0"].moe.experts.parameters()
    right = (
        torch.equal(experts.gate_up_proj, gate_up.transpose(1, 2)),
        torch.equal(experts.down_proj, down.transpose(1, 2)),
    )
    assert right == (hidden != GATE_UP_SQUARE, hidden != DOWN_SQUARE)


@pytest.mark.parametrize("turned", ["gate_up_proj", "down_proj"])
def test_two_tensors_of_different_layouts_are_refused(save, turned):
    directory = save(build(tiny_config(moe=True)), layout="published")
    name = f"{EXPERTS}.{turned}"
    rewrite(directory, lambda c: c.update({name: c[name].transpose(1, 2).contiguous()}))
    message = refusal(directory, tiny_config(moe=True))
    assert f"1 of another shape: {name}" in message


# ------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["published", "transformers"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("shard", [10**9, 40_000], ids=["single", "sharded"])
def test_round_trip_is_bit_identical(save, dtype, layout, moe, shard):
    model = build(tiny_config(moe), dtype=dtype)
    directory = save(model, dtype=dtype, layout=layout, max_shard_bytes=shard)
    assert (directory / INDEX).exists() == (shard < 10**9)
    read = Qwen3VL(read_config(directory)).to(dtype)
    load_hf(read, directory)
    assert_same(read.state_dict(), model.state_dict())
    # and from the files' side: what was read writes the same files
    again = save(read, "again", dtype, layout=layout, max_shard_bytes=shard)
    for file in directory.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_a_shard_is_no_larger_than_asked_unless_one_tensor_is(save):
    model = build(tiny_config(moe=True))
    directory = save(model, max_shard_bytes=100_000)
    index = json.loads((directory / INDEX).read_text())
    assert set(index["weight_map"]) == tensors(directory).keys()
    files = sorted(directory.glob("model-*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    for file in files:
        content = load_file(file)
        size = sum(t.nbytes for t in content.values())
        assert size <= 100_000 or len(content) == 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(directory).values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_transformers_loads_an_export_cleanly_and_computes_the_same(save, tied, moe, tokenizer):
    config = tiny_config(moe, tied)
    config = with_token_ids(
        replace(config, text=replace(config.text, vocab_size=600)),
        visual_token_ids(tokenizer),
        len(tokenizer),
    )
    model = build(config)
    directory = save(model, max_shard_bytes=200_000)
    assert ("lm_head.weight" in tensors(directory)) != tied
    reference = load_reference(directory, torch.float32)  # refuses any key that does not fit
    document = make_document(config, [random_picture(config, "image", (1, 4, 6), 1)], 1)
    (logits,) = ask_ours(model, pack([[document]], 64, config, reference)).logits
    torch.testing.assert_close(
        logits, ask_reference(reference, [document]).logits[0], atol=1e-5, rtol=1e-5
    )


def test_export_has_everything_that_transformers_asks_for(save, tokenizer):
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        GenerationConfig,
        Qwen2VLImageProcessorPil,
    )

    directory = save(build(tiny_config(moe=True)), dtype=torch.bfloat16)
    assert AutoConfig.from_pretrained(directory).dtype == torch.bfloat16
    loaded = AutoTokenizer.from_pretrained(directory)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert GenerationConfig.from_pretrained(directory).eos_token_id == tokenizer.eos_token_id
    assert Qwen2VLImageProcessorPil.from_pretrained(directory).patch_size == 16
    assert (directory / "video_preprocessor_config.json").exists()


def test_sharded_parameters_are_saved_whole(save, tmp_path):
    """As after bf16 training on one process, where FSDP2 wraps every parameter."""
    plain = build(tiny_config(moe=True))
    expected = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        mesh = init_device_mesh("cpu", (1,))
        for unit in plain.sharding_units():
            fully_shard(unit, mesh=mesh)
        fully_shard(plain, mesh=mesh)
        state = get_model_state_dict(plain)
        directory = save(state, config=plain.config)
        assert save(state, "none", config=plain.config, write=False)
        assert not (tmp_path / "none").exists()
    finally:
        dist.destroy_process_group()
    read = build(plain.config, seed=1)
    load_hf(read, directory)
    assert_same(read.state_dict(), expected)


def test_a_sharded_parameter_takes_its_part():
    dist.init_process_group("fake", rank=2, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,))
        parameter = distribute_tensor(torch.zeros(7, 3), mesh, [Shard(0)], src_data_rank=None)
        whole = torch.arange(21.0).view(7, 3)
        copy_into(parameter, whole)
        assert torch.equal(parameter.to_local(), whole[4:6])
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------- refusals


def test_one_error_names_missing_unexpected_and_misshapen_tensors(save):
    model = build(tiny_config(moe=True))
    directory = save(model)

    def change(content):
        del content["model.visual.merger.norm.weight"], content["lm_head.weight"]
        content["model.language_model.layers.9.input_layernorm.weight"] = torch.ones(64)
        content["model.visual.pos_embed.weight"] = torch.ones(81, 32)

    rewrite(directory, change)
    message = refusal(directory, model.config)
    assert str(directory) in message
    assert "2 missing: model.visual.merger.norm.weight, lm_head.weight" in message
    assert "1 unexpected: model.language_model.layers.9.input_layernorm.weight" in message
    assert "1 of another shape: model.visual.pos_embed.weight is [81, 32] there" in message
    assert "[64, 32] in the model" in message


def test_many_problems_are_counted_not_listed(save):
    directory = save(build(tiny_config(moe=False)))
    message = refusal(directory, tiny_config(moe=False, num_layers=6))
    assert "22 missing" in message and "and 17 more" in message and len(message) < 800


def test_a_checkpoint_of_other_dimensions_is_refused(save):
    directory = save(build(tiny_config(moe=True)))
    message = refusal(directory, tiny_config(moe=False))
    assert "missing" in message and "unexpected" in message and "experts" in message


def test_damaged_files_are_named(save):
    model = build(tiny_config(moe=False))
    directory = save(model, max_shard_bytes=100_000)
    victim = sorted(directory.glob("*.safetensors"))[1]
    content = victim.read_bytes()

    victim.write_bytes(content[:-100])
    assert f"{victim} is damaged or truncated" in refusal(directory, model.config)
    victim.write_bytes(content[:4])
    assert f"{victim} is damaged or truncated" in refusal(directory, model.config)
    victim.unlink()
    assert f"{victim} is missing" in refusal(directory, model.config)
    save_file({"other": torch.ones(1)}, victim)
    assert f"{victim} lacks model." in refusal(directory, model.config)
    (directory / INDEX).write_text('{"weight_map": ')
    assert f"{directory / INDEX} is damaged" in refusal(directory, model.config)
    (directory / INDEX).unlink()
    assert f"{directory} holds neither" in refusal(directory, model.config)


def test_quantised_tensors_are_refused(save):
    model = build(tiny_config(moe=False))
    directory = save(model)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    rewrite(directory, lambda c: c.update({name: c[name].to(torch.float8_e4m3fn)}))
    message = refusal(directory, model.config)
    assert name in message and "F8_E4M3" in message


def test_harmless_extras_are_ignored(save):
    model = build(tiny_config(moe=False, tied=True))
    directory = save(model)

    def change(content):
        content["model.language_model.rotary_emb.inv_freq"] = torch.ones(8)
        content["lm_head.weight"] = content["model.language_model.embed_tokens.weight"].clone()

    rewrite(directory, change)
    read = build(model.config, seed=1)
    load_hf(read, directory)
    assert_same(read.state_dict(), model.state_dict())

    rewrite(directory, lambda content: content["lm_head.weight"].add_(1))
    assert "lm_head.weight differs" in refusal(directory, model.config)


def test_names_of_a_model_saved_without_its_head_are_understood(tmp_path):
    reference = new_reference(tiny_config(moe=False, tied=True))
    reference.model.save_pretrained(tmp_path)
    assert "visual.pos_embed.weight" in tensors(tmp_path)
    model = build(tiny_config(moe=False, tied=True))
    load_hf(model, tmp_path)
    assert torch.equal(model.text.norm.weight, reference.model.language_model.norm.weight)


def test_settings_that_no_shape_shows_are_compared_too(save, caplog):
    config = tiny_config(moe=True)
    directory = save(build(config))
    other = replace(config, text=replace(config.text, rope_theta=5e6, max_positions=8192))
    with caplog.at_level(logging.WARNING):
        load_hf(build(other), directory)
    assert [r.getMessage() for r in caplog.records] == [
        f"{directory} was trained with text rope_theta = 10000.0; the model has 5000000.0"
    ]
