"""Which device this process uses, the process group it joins, sums over ranks, and what all ranks
must agree on."""

import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from titan_vlm.config import Comm
from titan_vlm.errors import ConfigError, DataError, ReadError, UserError

# An expert's weights, sharded twice, are gathered in two steps when they are saved: as intended.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def world_size() -> int:
    """How many processes torchrun started; 1 without it. Known before they are connected."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device_type(device: str) -> str:
    """What `run.device` stands for here: "cpu" or "cuda"."""
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def is_hidden_rank() -> bool:
    """Whether this is a process of torchrun's whose output is not shown by default."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") != "0"


def processes_per_node() -> int:
    """How many of them run on each node; all where there is no torchrun to say so."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def start(device: str, comm: Comm | None = None) -> torch.device:
    """Join the process group that torchrun describes (or a group of one) and pick the device.

    Args:
        device: "auto", "cpu" or "cuda" (`run.device`).
        comm: `[comm]`; None: its defaults.

    Returns:
        This rank's device.

    Raises:
        ConfigError: CUDA is asked for and not there, or there are fewer GPUs than local ranks.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('run.device = "cuda": no CUDA device is visible; use "cpu" or "auto"')
    tune_cpu()
    kind = device_type(device)
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank}: only {torch.cuda.device_count()} GPUs are visible; "
                f"start at most as many processes per node (NGPU)"
            )
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    timeout = timedelta(seconds=(comm or Comm()).timeout_s)
    # Groups made later, of a mesh or for checkpoints, ask for the default, not for their parent's.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:  # started without torchrun: a world of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return torch.device(kind, local_rank if kind == "cuda" else None)


def tune_cpu() -> None:
    """Settings of the CPU that cost nothing; to be called before the first tensor is made."""
    # Sharp attention makes probabilities below 1e-38, on which a CPU works a hundred times slower;
    # threads take this over from the one that starts them.
    torch.set_flush_denormal(True)
    # Activations in pages of 2 MiB: a tenth off a training step, where the kernel grants them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def sum_over(view: DeviceMesh | None, value: Tensor) -> Tensor:
    """The sum of `value` over the ranks of a one-axis view, in place."""
    if view is not None and view.size() > 1:
        dist.all_reduce(value, group=view.get_group())
    return value


# ---------------------------------------------------------------------------- agreement


def tell_all(error: Exception | None) -> None:
    """Raise on every rank what any of them has met; all call this, with None where all is well.

    Raises:
        UserError: on a rank with an error that one, on the others the text of the first that has
            one, of its kind; a DataError for what is no UserError.
    """
    found: list[Exception | None] = [error]
    if _size() > 1:
        found = [None] * _size()
        dist.all_gather_object(found, error)
    if error is not None:
        raise error if isinstance(error, UserError) else DataError(str(error)) from error
    for k, theirs in enumerate(found):
        if theirs is not None:
            kind = type(theirs) if isinstance(theirs, UserError) else DataError
            raise kind(f"rank {k}: {theirs}")


@contextmanager
def together() -> Iterator[None]:
    """Around what every rank does by itself, without exchanges: where one of them fails, all do.
    Exchanges 4 bytes."""
    error = None
    try:
        yield
    except (UserError, ReadError) as caught:
        error = caught
    failed = torch.tensor([error is not None], dtype=torch.int32)
    if _size() > 1:
        dist.all_reduce(failed, dist.ReduceOp.MAX)
    if failed:
        tell_all(error)


def check_alike(facts: Mapping[str, Any]) -> None:
    """Refuse, on all ranks, facts that are not the same on all of them.

    Raises:
        ConfigError: names the first of them, and the ranks and hosts that differ from rank 0.
    """
    if _size() == 1:
        return
    found: list[Any] = [None] * _size()
    dist.all_gather_object(found, (platform.node(), dict(facts)))
    for key in dict.fromkeys(key for _, each in found for key in each):
        first = found[0][1].get(key)
        others = [k for k, (_, each) in enumerate(found) if each.get(key) != first]
        if others:
            host, theirs = found[others[0]]
            raise ConfigError(
                f"{key} = {first} on rank 0 ({found[0][0]}), but {theirs.get(key)} on rank "
                f"{', '.join(map(str, others))} ({host}): give every rank the same files and "
                "settings"
            )


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
