"""Out of memory: what this rank holds, and which settings would make it less.

One rank is enough to end the run: torchrun ends the others as soon as it exits. Without torchrun
they notice when their connection breaks (gloo) or after `comm.timeout_s` (NCCL; `hang.py`).
"""

import errno
import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_vlm.config import Config

GIB = 2**30
# PyTorch's allocators and the libraries under it raise a plain RuntimeError.
_SAID = re.compile(
    "DefaultCPUAllocator: can't allocate memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class OutOfMemory(Exception):
    """The report, which is on stderr already."""


class MemoryReport:
    """`with MemoryReport(config) as memory:` prints a report of every error that says "no memory".

    `memory.run` is to be the run, once there is one: it tells what the memory is used for.
    """

    def __init__(self, config: Config):
        self.config = config
        self.run: Any = None  # of train.py

    def __enter__(self) -> "MemoryReport":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and is_out_of_memory(error):
            said = report(error, self.config, self.run)
            print(said, file=sys.stderr, flush=True)
            raise OutOfMemory(said) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is an allocator's error, of the device or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_SAID.search(str(error)))


def report(error: BaseException, config: Config, run: Any = None) -> str:
    """Where it happened, what memory is used for, what would help."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    when = f"at step {run.step + 1}" if run else "while setting up"
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    device = run.device if run else torch.device("cpu")
    used = memory_used(device)
    lines = [f"error: rank {rank} is out of memory {when}: {why}"]
    if run:
        shares = shares_held(run.model, run.optimizer)
        rest = max(used - sum(shares.values()), 0)
        shares["activations and everything else"] = rest
        lines.append("  held: " + ", ".join(f"{k} {_gib(v)}" for k, v in shares.items()))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        lines.append(f"  allocated {_gib(used)}, free {_gib(free)} of {_gib(total)} on {device}")
        lines.append(torch.cuda.memory_summary(device, abbreviated=True))
    else:
        limit = memory_limit()
        lines.append(
            f"  resident {_gib(used)}, limit {_gib(limit) if limit else 'unknown'}, of all "
            "processes on this machine or in this container"
        )
    lines.append("  each of these would need less; now they are:")
    lines += [f"    {key} = {value}: {what}" for key, value, what in what_helps(config)]
    return "\n".join(lines)


def shares_held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this rank's parts."""
    parameters = list(model.parameters())
    states = (x for state in optimizer.state.values() for x in state.values())
    return {
        "parameters": _bytes(parameters),
        "gradients": _bytes(p.grad for p in parameters),
        "optimizer": _bytes(states),
    }


def _bytes(tensors: Iterable[Any]) -> int:
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            total += part.numel() * part.element_size()
    return total


def memory_used(device: torch.device) -> int:
    """Bytes: allocated by PyTorch on CUDA, elsewhere resident (Linux; else the most so far)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_limit() -> int | None:
    """Bytes that this process may have at most: by ulimit, its container, or the machine."""
    limits = [x for x in resource.getrlimit(resource.RLIMIT_AS) if x != resource.RLIM_INFINITY]
    for path in map(Path, _CGROUPS):
        if path.exists() and (text := path.read_text().strip()).isdecimal():
            limits.append(int(text))
    table = Path("/proc/meminfo")
    if table.exists() and (found := re.search(r"MemTotal:\s+(\d+) kB", table.read_text())):
        limits.append(int(found[1]) * 1024)
    return min(limits, default=None)


def what_helps(config: Config) -> list[tuple[str, Any, str]]:
    """(key, present value, what to do), without what is at its end already."""
    training, parallelism = config.training, config.parallelism
    mode, cuda = config.activation_checkpoint.mode, config.run.device != "cpu"
    choices = [
        (
            training.micro_batch_size > 1,
            "training.micro_batch_size",
            training.micro_batch_size,
            "lower it; the batch of a step stays, in more passes",
        ),
        (
            mode != "full",
            "activation_checkpoint.mode",
            f'"{mode}"',
            'set "selective", or "full" which needs the least',
        ),
        (True, "training.seq_len", training.seq_len, "lower it (changes the rows of the run)"),
        (
            training.loss_chunk_tokens > 64,
            "training.loss_chunk_tokens",
            training.loss_chunk_tokens,
            "lower it",
        ),
        (True, "data.max_pixels", config.data.max_pixels, "lower it (smaller pictures)"),
        (
            True,
            "parallelism.dp_shard, ep",
            f"{parallelism.dp_shard}, {parallelism.ep}",
            "spread parameters and experts over more ranks",
        ),
        (
            cuda and not parallelism.cpu_offload,
            "parallelism.cpu_offload",
            str(parallelism.cpu_offload).lower(),
            "true keeps parameters, gradients and optimizer on the host",
        ),
    ]
    return [(key, value, what) for helps, key, value, what in choices if helps]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
