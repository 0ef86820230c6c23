"""Saving and restoring a run with torch.distributed.checkpoint (DCP).

    checkpoints/
      step-000100/        complete: it got this name after its last byte was written
      step-000200.tmp/    being written, or what a killed process left; nobody reads it

What a checkpoint holds, by key:

    model.<parameter>               weights and persistent buffers
    optimizer.<parameter>.<state>   exp_avg, exp_avg_sq, step
    train.rank<r>                   what rank r alone knows: its random generators, its data loader

Tensors are saved under the parameter's name and read into the shards of whoever asks, and every
rank reads what all ranks knew, so that neither the mesh, nor the number of processes, nor the order
of parameter groups is part of a checkpoint. Hyper-parameters are
not in it either: they are the configuration's, and the schedule is a function of the step.
"""

import io
import os
import random
import re
import shutil
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from titan_vlm.config import Checkpoint
from titan_vlm.errors import ConfigError

# One process without a group is no mistake, and DCP warns of it at every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

_FOLDER = re.compile(r"step-(\d{6,})")


class Checkpointer:
    """Writes and reads the checkpoints of one run. Every rank makes one and calls it alike."""

    def __init__(self, directory: str | Path, config: Checkpoint):
        self.directory = Path(directory)
        self.config = config
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        # A group of its own: an asynchronous save talks in a thread, where its messages must not
        # meet those of the training step. Gloo, because it saves host memory. One process has
        # nobody to talk to, and the threads in which gloo would do it anyway slow every parallel
        # loop after it down (OpenMP stops spinning once there are more threads than cores).
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._world: dict[str, Any] = {"no_dist": True}
        if not alone:
            self._world = {"process_group": dist.new_group(backend="gloo", group_desc="checkpoint")}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._latest: int | None = None  # the step last saved or loaded here

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, train: dict[str, Any]
    ) -> None:
        """Save everything as of now; random generators are added to `train` and restored with it.

        With `async_save` this returns once the state is copied to host memory; the files are
        written in a thread, and the next save waits for them. A step saved already is not
        saved again.

        Args:
            train: whatever else resuming needs, picklable, this rank's own.
        """
        self.wait()
        if step == self._latest:
            return
        self._latest = step
        final = self._folder(step)
        temporary = final.with_name(final.name + ".tmp")
        if self.rank == 0 and temporary.exists():
            shutil.rmtree(temporary)
        state = {
            "model": get_model_state_dict(model),
            "optimizer": _optimizer_tensors(model, optimizer),
            "train": {f"rank{self.rank}": _pack({"caller": train, "random": _random_state()})},
        }
        where = {"checkpoint_id": temporary, **self._world}
        if self.config.async_save:
            written = dcp.async_save(state, **where)
            self._pending = self._thread.submit(self._publish, written, temporary, final)
        else:
            dcp.save(state, **where)
            self._publish(None, temporary, final)

    def _publish(self, written: Future | None, temporary: Path, final: Path) -> None:
        """Give a complete checkpoint its name, then drop the oldest ones."""
        if written is not None:
            written.result()
        if self.rank != 0:  # rank 0 returns from a save only after every rank has written
            return
        if final.exists():  # an older run of the same step; its successor is complete beside it
            shutil.rmtree(final)
        os.rename(temporary, final)
        keep = self.config.keep_latest_k
        for step in self.steps()[:-keep] if keep else []:
            shutil.rmtree(self._folder(step))

    def wait(self) -> None:
        """Return when nothing is being written any more; raise what went wrong while writing."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        names = [path.name for path in self.directory.glob("step-*")]
        return sorted(int(match[1]) for name in names if (match := _FOLDER.fullmatch(name)))

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def saved(self, step: int) -> set[str]:
        """Names of the model's tensors in the checkpoint of a step."""
        metadata = dcp.FileSystemReader(self._folder(step)).read_metadata()
        names = metadata.state_dict_metadata
        return {name.removeprefix("model.") for name in names if name.startswith("model.")}

    def load(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> list[dict[str, Any]]:
        """Restore `model`, `optimizer` and the random generators in place.

        A rank that did not exist when the checkpoint was written keeps its generators.

        Returns:
            The `train` of each rank that saved.

        Raises:
            ConfigError: the checkpoint is of another model.
        """
        folder = self._folder(step)
        metadata = dcp.FileSystemReader(folder).read_metadata()
        saved = metadata.state_dict_metadata
        model_state = get_model_state_dict(model)
        _check_fit(folder, metadata, self._of_all_ranks(model_state))
        _create_optimizer_state(optimizer)
        optimizer_state = {
            # A parameter that never had a gradient has no state in the checkpoint, nor gets one.
            name: tensor
            for name, tensor in _optimizer_tensors(model, optimizer).items()
            if f"optimizer.{name}" in saved
        }
        state = {
            "model": model_state,
            "optimizer": optimizer_state,
            "train": {f"rank{rank}": b"" for rank in range(_ranks(saved))},
        }
        # Tensors are filled where they are; the placeholder of `train` is replaced.
        dcp.load(state, checkpoint_id=folder, **self._world)
        for name, parameter in model.named_parameters():
            if f"{name}.step" not in optimizer_state:
                optimizer.state.pop(parameter, None)
        self._latest = step
        ranks = [_unpack(packed) for packed in state["train"].values()]
        if self.rank < len(ranks):
            _set_random_state(ranks[self.rank]["random"])
        return [rank["caller"] for rank in ranks]

    def _of_all_ranks(self, model_state: dict[str, Tensor]) -> dict[str, "Form"]:
        """The model's tensors by key; of a pipeline, the stages of all ranks."""
        forms = {f"model.{name}": (x.shape, x.dtype) for name, x in model_state.items()}
        if "process_group" not in self._world:
            return forms
        gathered: list[dict] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, forms, group=self._world["process_group"])
        return {name: form for rank in gathered for name, form in rank.items()}

    def _folder(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def _create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state, by a step that changes no weight (rate 0)."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


Form = tuple[torch.Size, torch.dtype]


def _check_fit(folder: Path, metadata: Metadata, wanted: dict[str, Form]) -> None:
    saved = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    shapes = [
        f"{name} is {list(saved[name].size)} there and {list(shape)} here"
        for name, (shape, _) in wanted.items()
        if name in saved and saved[name].size != shape
    ]
    dtypes = [
        f"{name} is {saved[name].properties.dtype} there and {dtype} here"
        for name, (_, dtype) in wanted.items()
        if name in saved and saved[name].properties.dtype != dtype
    ]
    missing = [f"{name} is not in it" for name in wanted if name not in saved]
    unexpected = [f"{name} is only there" for name in saved if name not in wanted]
    differing = [name for name in (*wanted, *saved) if (name in saved) != (name in wanted)]
    if differing and not (shapes or dtypes) and all(_STEERING in name for name in differing):
        raise ConfigError(_other_steering(folder, differing, saved))
    problems = [*shapes, *missing, *unexpected, *dtypes]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(
            f"{folder} is a checkpoint of another model: {'; '.join(problems[:3])}{more}; "
            "set the model it was trained with, or another run.output_dir"
        )


# What balances experts without a loss (`models/moe/steering.py`), and the settings that ask for it.
_STEERING = ".router.steering."
_ASKED_BY = {
    "bias_E": 'bias_update = "sign" or "quantile"',
    "threshold_E": 'router = "threshold"',
    "load_ema_E": 'router = "expert_choice"',
}


def _other_steering(folder: Path, differing: list[str], saved: Mapping[str, Any]) -> str:
    """`differing`: buffers that only the checkpoint or only the model has, of steering alone."""
    name = next(name for name in differing if name.rpartition(".")[2] in _ASKED_BY)
    setting, buffer = _ASKED_BY[name.rpartition(".")[2]], name.removeprefix("model.")
    if name in saved:
        problem = f"{buffer} is only there, of a run with {setting}: set that again"
    else:
        problem = f"{buffer} is not in it, which {setting} needs: leave that as it was"
    return (
        f"{folder} was saved with other balancing of experts: {problem} in that branch's [moe.*], "
        "or start anew in another run.output_dir"
    )


def _ranks(saved: Mapping[str, Any]) -> int:
    """How many processes wrote a checkpoint with these keys."""
    return sum(name.startswith("train.rank") for name in saved)


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])


# Bytes, because DCP would flatten a dictionary and ask for the same structure when loading.
def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
