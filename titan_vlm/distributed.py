"""Which device this process uses, the process group it joins, and sums over ranks."""

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from titan_vlm.config import Comm
from titan_vlm.errors import ConfigError

# An expert's weights, sharded twice, are gathered in two steps when they are saved: as intended.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def world_size() -> int:
    """How many processes torchrun started; 1 without it. Known before they are connected."""
    return int(os.environ.get("WORLD_SIZE", 1))


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
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
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
