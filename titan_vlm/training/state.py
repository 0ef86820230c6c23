"""What a checkpoint holds beside the model: the optimizer's tensors and the random generators."""

import io
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from titan_vlm.errors import ConfigError

Form = tuple[torch.Size, torch.dtype]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by `<parameter>.<state>`."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
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


def check_fit(folder: str, metadata: Metadata, wanted: dict[str, Form]) -> None:
    """Refuse a checkpoint whose `model.` tensors are not those `wanted`.

    Raises:
        ConfigError: names the first that differ.
    """
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


def _other_steering(folder: str, differing: list[str], saved: Mapping[str, Any]) -> str:
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


def random_state() -> dict[str, Any]:
    """The states of all random generators of this process, of types that `weights_only` reads."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Takes back what `random_state` gave."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])


# Bytes, because DCP would flatten a dictionary and ask for the same structure when loading.
def pack(value: Any) -> bytes:
    """Tensors, and plain Python values around them, as bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """What `pack` took; of bytes that hold anything else, an error and no side effect."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
