"""The trainer as a user runs it: one command, killed, resumed, finished, mistaken."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from titan_vlm import train

SMALL = {
    "model.flavor": "debug_moe",
    "data.min_pixels": "1024",
    "data.virtual_shards": "4",
    "data.pack_window": "4",
    "training.seq_len": "96",
    "training.steps": "6",
    "training.global_batch_size": "2",
    "training.micro_batch_size": "1",
    "training.dtype": "float32",
    "schedule.warmup_steps": "2",
    "checkpoint.every": "3",
    "checkpoint.export_hf": "true",
    "checkpoint.export_dtype": "float32",
    "metrics.log_every": "1",
    "metrics.tensorboard": "false",
    "eval.every": "0",
    "eval.samples": "3",
    "eval.max_new_tokens": "2",
}


def run(output: Path, **changes: str) -> int:
    """`section__key=value` changes the small run; returns the exit status."""
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return train.main(["--config", "qwen_vlm_moe.toml", "--run.output_dir", str(output), *words])


def curve(output: Path) -> list[tuple]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


def weights(output: Path) -> dict[str, torch.Tensor]:
    (file,) = (output / "hf").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__num_workers": "2", "checkpoint__async_save": "true"},
        {"training__dtype": "bfloat16"},
    ],
    ids=["plain", "workers and async save", "bfloat16"],
)
def test_a_killed_run_resumes_bitwise(tmp_path, monkeypatch, changes):
    assert run(tmp_path / "whole", **changes) == 0
    whole = train.train_step

    def killed_in_step_5(state, metrics):
        if state.step == 4:
            raise KeyboardInterrupt
        whole(state, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", killed_in_step_5)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", **changes)
    assert run(tmp_path / "killed", **changes) == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    resumed, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_finished_run_says_so_and_trains_nothing(tmp_path, monkeypatch, caplog):
    assert run(tmp_path, training__steps="2") == 0
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("trained again"))
    with caplog.at_level("INFO"):
        assert run(tmp_path, training__steps="2") == 0
    assert "this run is finished: step 2 of 2" in caplog.text


def test_accumulation_does_not_change_the_mathematics(tmp_path):
    one = {"training__dtype": "float64", "training__global_batch_size": "4"}
    assert run(tmp_path / "four", **one, training__micro_batch_size="1") == 0
    assert run(tmp_path / "one", **one, training__micro_batch_size="4") == 0
    for ours, theirs in zip(curve(tmp_path / "four"), curve(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_frozen_branch_stays_and_the_others_learn(tmp_path):
    assert run(tmp_path / "all", training__steps="1", schedule__warmup_steps="0") == 0
    start = tmp_path / "all" / "hf"
    changes = {"training__freeze": '["vision"]', "checkpoint__initial_load_path": str(start)}
    assert run(tmp_path / "frozen", training__steps="2", **changes) == 0
    before, after = weights(tmp_path / "all"), weights(tmp_path / "frozen")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    vision = {n for n in before if ".visual." in n and "merger" not in n}
    assert vision and not moved & vision
    assert {n for n in before if ".language_model." in n and "proj" in n} <= moved


@pytest.mark.parametrize("mode", ["full", "selective", "layers"])
def test_activation_checkpointing_changes_no_number(tmp_path, mode):
    exact = {"training__dtype": "float64", "training__steps": "2"}
    assert run(tmp_path / "none", **exact) == 0
    assert run(tmp_path / mode, **exact, activation_checkpoint__mode=mode) == 0
    for ours, theirs in zip(curve(tmp_path / mode), curve(tmp_path / "none"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__flavor": "debug_mow"}, "debug_moe"),
        ({"model__flavor": "hf", "model__hf_path": "nowhere"}, "nowhere"),
        ({"data__tokenizer": "nowhere"}, "data.tokenizer"),
        ({"data__source": "llava", "data__path": "none.jsonl"}, "none.jsonl"),
        ({"data__source": "webdataset", "data__path": "none.tar"}, "none.tar"),
        ({"data__virtual_shards": "3", "data__num_workers": "2"}, "data.virtual_shards"),
        ({"training__freeze": '["visoin"]'}, "'vision'"),
        ({"checkpoint__initial_load_path": "nowhere"}, "nowhere"),
        ({"training__global_batch_size": "3", "training__micro_batch_size": "2"}, "multiple"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capfd, changes, said):
    assert run(tmp_path, **changes) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert said in errors[0]


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capfd):
    assert run(tmp_path, training__steps="2") == 0
    assert run(tmp_path, training__steps="4", model__flavor="debug") == 2
    assert "checkpoint of another model" in capfd.readouterr().err


def test_a_batch_that_ranks_do_not_divide_is_refused_with_the_nearest():
    from titan_vlm.config import load_config
    from titan_vlm.errors import ConfigError

    config = load_config("qwen_vlm_moe.toml", ["--training.micro_batch_size", "2"])
    with pytest.raises(ConfigError, match="use 6 or 12"):
        train.check_batch(config, ranks=3)
