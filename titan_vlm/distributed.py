"""Which device this process uses, and the process group it joins."""

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_vlm.errors import ConfigError


def start(device: str) -> tuple[torch.device, DeviceMesh]:
    """Join the process group that torchrun describes (or a group of one) and pick the device.

    Args:
        device: "auto", "cpu" or "cuda" (`run.device`).

    Returns:
        This rank's device, and the mesh of data-parallel ranks.

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
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:  # started without torchrun: a world of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    return torch.device(kind, local_rank if kind == "cuda" else None), mesh


def tune_cpu() -> None:
    """Settings of the CPU that cost nothing; to be called before the first tensor is made."""
    # Sharp attention makes probabilities below 1e-38, on which a CPU works a hundred times slower;
    # threads take this over from the one that starts them.
    torch.set_flush_denormal(True)
    # Activations in pages of 2 MiB: a tenth off a training step, where the kernel grants them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value
