"""An export answers in transformers as the model does here, token by token."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.check_export import choose, compare, load_theirs, random_export, report
from titan_vlm.config import load_config
from titan_vlm.data.sample import RawSample, text_part
from titan_vlm.errors import ConfigError

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
