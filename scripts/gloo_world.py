"""A gloo world that stays: processes start once and then run one job after the other.

Starting eight processes takes ten seconds on two cores, a job on them milliseconds. Each job says
how many ranks it wants; every rank finds the environment that torchrun would give it, joins the
group as the trainer does (`distributed.start("cpu")`), and its group is destroyed after the job.
"""

import contextlib
import gc
import multiprocessing as mp
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from functools import _lru_cache_wrapper
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import _redistribute
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

JOB_TIMEOUT_S = 240


class World:
    """Ranks 0, 1, ... as processes of one thread each."""

    def __init__(self):
        self._processes: list[mp.Process] = []
        self._pipes: list[Any] = []

    def run(self, ranks: int, function: Callable, *args: Any) -> list[Any]:
        """`function(*args)` on each of `ranks` processes; what each returned.

        Raises:
            AssertionError: a rank raised; its traceback.
        """
        self._grow(ranks)
        port = free_port()
        for rank, pipe in enumerate(self._pipes[:ranks]):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            pipe.send((environment, function, args))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        end = time.monotonic() + JOB_TIMEOUT_S
        while len(results) + len(errors) < ranks and time.monotonic() < end:
            for rank, pipe in enumerate(self._pipes[:ranks]):
                if rank in results or rank in errors:
                    continue
                if pipe.poll(0.002):
                    try:
                        error, value = pipe.recv()
                    except EOFError:
                        error, value = "the process died", None
                    if error:
                        errors[rank] = error
                        end = min(end, time.monotonic() + 5)  # the others may wait for it for ever
                    else:
                        results[rank] = pickle.loads(value)
        if len(results) < ranks:
            self.close()  # whoever hangs in a collective is of no more use
            late = sorted(set(range(ranks)) - set(results) - set(errors))
            said = "\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(errors.items()))
            raise AssertionError(f"{said}\nranks that never came back: {late or 'none'}")
        return [results[rank] for rank in range(ranks)]

    def _grow(self, ranks: int) -> None:
        context = mp.get_context("spawn")
        while len(self._processes) < ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the processes; the next job starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes.clear()
        self._pipes.clear()


def serve(pipe: Any) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    while True:
        try:
            environment, function, args = pipe.recv()
        except EOFError:
            return
        os.environ.update({name: str(value) for name, value in environment.items()})
        try:
            answer = ("", pickle.dumps(function(*args)))
        except BaseException:
            answer = (traceback.format_exc(), b"")
        leave_groups()
        pipe.send(answer)


def leave_groups() -> None:
    """Destroy this job's process groups, and what DTensor remembers of them by equal meshes.

    A model and its hooks refer to each other and keep groups alive until they are collected: gloo's
    threads, a few of each group, would then watch connections that peers have closed, for ever.
    """
    gc.collect()  # the job's own, while there are groups that it may still ask for
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a peer may be gone already
            dist.destroy_process_group()
    _clear_sharding_prop_cache()
    _redistribute.clear_redistribute_planner_cache()
    for value in gc.get_objects():
        if type(value) is _lru_cache_wrapper and "torch.distributed" in str(value.__module__):
            value.cache_clear()
    gc.collect()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
