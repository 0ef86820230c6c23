"""The trainer on a run of seconds, for tests of whole runs."""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file

from titan_vlm import lock, train
from titan_vlm.config import Config, load_config

SMALL = {
    "model.flavor": "debug_moe",
    "moe.text.aux_loss": "0",
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
    return train.main(["--config", "qwen_vlm_moe.toml", *words(output, changes)])


def small_config(output: Path, **changes: str) -> Config:
    """The configuration of that run."""
    return load_config("qwen_vlm_moe.toml", words(output, changes))


def words(output: Path, changes: dict[str, str]) -> list[str]:
    settings = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    settings["run.output_dir"] = str(output)
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


class Silent:
    """The part of MetricsLogger that a step calls; reports nothing."""

    def waiting_for_data(self):
        return nullcontext()

    def count(self, **_):
        pass

    def due(self, step):
        return False

    def end_step(self, step, **_):
        pass


def run_killed(output: Path, step: int, **changes: str) -> None:
    """The same, interrupted when step `step` + 1 was about to begin."""
    whole = train.train_step

    def interrupted(state, metrics):
        if state.step == step:
            state.checkpointer.settle()  # its thread, unlike that of a process, would not be gone
            raise KeyboardInterrupt
        whole(state, metrics)

    train.train_step = interrupted
    try:
        run(output, **changes)
    except KeyboardInterrupt:
        lock.release()  # as the end of the process would
        return
    finally:
        train.train_step = whole
    raise AssertionError(f"the run ended before step {step}")


def curve(output: Path) -> list[tuple]:
    """(step, loss, gradient norm) of each step, in the order of the log."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The exported weights, by their Hugging Face names."""
    (file,) = (output / "hf").glob("*.safetensors")
    return load_file(file)
