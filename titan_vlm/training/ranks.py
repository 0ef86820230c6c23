"""The processes that write and read one run's checkpoints together."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class StorageError(Exception):
    """The storage failed, for all ranks alike."""


class Ranks:
    """All ranks of the run, in a process group of their own; every rank makes one.

    An asynchronous save talks in a thread, where its messages must not meet those of the training
    step. Gloo, because it saves host memory. One process has nobody to talk to, and the threads in
    which gloo would do it anyway slow every parallel loop after it down (OpenMP stops spinning once
    there are more threads than cores).

    Attributes:
        rank, size: this process, and how many there are.
        for_dcp: what torch.distributed.checkpoint must be told of them.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self._group = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", group_desc="checkpoint")
        self.for_dcp = {"process_group": self._group} if self._group else {"no_dist": True}

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Do something on rank 0; all ranks return what it returned.

        Raises:
            StorageError: what it raised, on all ranks.
        """
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = action()
            except Exception as error:
                answer[1] = f"{type(error).__name__}: {error}"
        if self._group is not None:
            dist.broadcast_object_list(answer, group=self._group, group_src=0)
        if answer[1] is not None:
            raise StorageError(answer[1])
        return answer[0]

    def union(self, own: dict) -> dict:
        """What the ranks have, together; of one key, what the last rank that has it says."""
        if self._group is None:
            return dict(own)
        gathered: list[dict] = [{}] * self.size
        dist.all_gather_object(gathered, own, group=self._group)
        return {key: value for rank in gathered for key, value in rank.items()}

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank. Talks in the default group, which a thread that writes
        does not use."""
        if self._group is None:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)
