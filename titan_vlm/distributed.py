"""Which device this process uses, and the process group it joins."""

import os
import socket

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
    if "RANK" not in os.environ:  # started without torchrun: a world of one
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('run.device = "cuda": no CUDA device is visible; use "cpu" or "auto"')
    # Sharp attention makes probabilities below 1e-38, on which a CPU works a hundred times slower;
    # threads take this over from the one that starts them, so it comes before the first operation.
    torch.set_flush_denormal(True)
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank}: only {torch.cuda.device_count()} GPUs are visible; "
                f"start at most as many processes per node (NGPU)"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    return torch.device(kind, local_rank if kind == "cuda" else None), mesh


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value
