"""An export answers in transformers as the model does here, token by token."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.check_export import choose, compare, load_theirs, random_export, report
from scripts.hf_reference import (
    ask_ours,
    ask_reference,
    load_reference,
    make_document,
    new_reference,
    pack,
    random_picture,
)
from tests.small_run import Silent, small_config
from titan_vlm import train
from titan_vlm.config import load_config
from titan_vlm.data.sample import RawSample, text_part
from titan_vlm.errors import ConfigError
from titan_vlm.models.qwen3_vl.config import FLAVORS

SAMPLES = 6


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    config = load_config("qwen_vlm_moe.toml")
    directory = tmp_path_factory.mktemp("export") / "hf"
    random_export(config, directory)
    return config, directory


def change(directory, target, edit):
    """A copy of the export with its tensors edited."""
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_transformers_generates_the_same_tokens(exported, capsys):
    samples, ours, theirs, parts = compare(*exported, SAMPLES)
    assert ours == theirs and len(ours) == SAMPLES
    assert len({tuple(tokens) for tokens in ours}) > 1  # the answers depend on the question
    assert report(samples, ours, theirs, parts) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["samples"], figures["max_mismatched_samples"]) == (SAMPLES, 0)

    theirs[2] = [*theirs[2], 0]
    assert report(samples, ours, theirs, parts) == 1
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["max_mismatched_samples"] == 1


def test_omni_generates_the_same_tokens_by_the_code_beside_it(tmp_path, monkeypatch):
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    settings = {"model.name": "omni", "model.flavor": "debug", "projector.levels": "1:0"}
    settings |= {"moe.text.experts": "4", "moe.text.top_k": "2", "moe.text.expert_width": "24"}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    config = load_config("qwen_vlm_moe.toml", words)
    random_export(config, tmp_path / "hf")
    _, ours, theirs, _ = compare(config, tmp_path / "hf", SAMPLES)
    assert ours == theirs and len(ours) == SAMPLES
    assert len({tuple(tokens) for tokens in ours}) > 1


def test_an_upcycled_run_is_exported_as_it_was_trained(tmp_path):
    """A dense model that transformers made, two steps with experts, and back to transformers."""
    new_reference(FLAVORS["debug"]).save_pretrained(tmp_path / "dense")
    settings = {"experts": "8", "top_k": "4", "expert_width": "192", "upcycle_shards": "2"}
    changes = {f"moe__text__{key}": value for key, value in settings.items()}
    changes |= {"model__flavor": "hf", "model__hf_path": str(tmp_path / "dense")}
    changes["checkpoint__initial_load_path"] = str(tmp_path / "dense")
    config = small_config(tmp_path / "run", **changes)
    run = train.prepare(config)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for _ in range(2):
        train.train_step(run, Silent())
    train.export_hf(run)
    run.loader.close()
    torch.distributed.destroy_process_group()
    for part in ("router.weight", "experts.gate_up", "experts.down"):
        name = f"text.layers.1.moe.{part}"
        assert not torch.equal(before[name], run.model.get_parameter(name))

    theirs, dims = load_reference(tmp_path / "run" / "hf", torch.float32), run.parts.dims
    picture = random_picture(dims, "image", (1, 4, 6), 1)
    document = make_document(dims, [picture], 2, text=40)
    batch = pack([[document]], len(document.tokens_S), dims, theirs)
    (ours_SV,) = ask_ours(run.model, batch).logits
    (theirs_SV,) = ask_reference(theirs, [document]).logits
    assert (ours_SV - theirs_SV).abs().max() < 1e-5 * theirs_SV.abs().max()
    # The script that checks a run is told by its config.toml to upcycle.
    _, ours, generated, _ = compare(config, tmp_path / "run" / "hf", 2)
    assert ours == generated and len(ours) == 2


def test_a_tensor_that_transformers_does_not_know_is_refused(exported, tmp_path):
    def add(tensors):
        tensors["model.language_model.more.weight"] = torch.zeros(2)

    with pytest.raises(ConfigError, match="model.language_model.more.weight"):
        load_theirs(change(exported[1], tmp_path / "hf", add))


def test_a_tensor_that_is_absent_is_refused(exported, tmp_path):
    def remove(tensors):
        del tensors["lm_head.weight"]

    with pytest.raises(ConfigError, match="lm_head.weight"):
        load_theirs(change(exported[1], tmp_path / "hf", remove))


def test_samples_that_cannot_be_compared_are_left_out_and_counted(capsys):
    question = {"role": "user", "content": [text_part("Which?")]}
    film = {"role": "user", "content": [{"type": "video", "video": None}]}
    answer = {"role": "assistant", "content": [text_part("This.")]}
    conversations = ([question], [film, answer], [answer], [question, answer], [film, answer])
    source = [RawSample(str(i), list(turns), str(i)) for i, turns in enumerate(conversations)]
    assert [raw.id for raw in choose(source, 2)] == ["3"]
    told = capsys.readouterr().out
    assert "without a question and an answer: 2\n" in told
    assert "with a video: 2\n" in told
    with pytest.raises(ConfigError, match="none of the held-out"):
        choose(source[:3], 2)
    with pytest.raises(ConfigError, match="--samples 0: expected at least 1"):
        choose(source, 0)
