"""Saving and restoring a run with torch.distributed.checkpoint (DCP): whole or absent.

    save    state -> (copy in host memory) -> DCP writes, every rank its shards -> rank 0: manifest,
            fsync, rename -> older ones pruned
            with `async_save` a thread does all after the copy
    resume  newest checkpoint -> every file checked against the manifest -> loaded
            a damaged one is set aside, and the one before is tried

    checkpoints/
      step-000100/            complete: it got this name after its last byte was on the disk
      step-000200.tmp/        being written, or what a killed process left; nobody reads it
      step-000300.damaged/    set aside; nobody reads it

What a checkpoint holds, by key:

    model.<parameter>               weights and persistent buffers
    optimizer.<parameter>.<state>   exp_avg, exp_avg_sq, step
    train.rank<r>                   what rank r alone knows: its random generators, its data loader

Tensors are saved under the parameter's name and read into the shards of whoever asks, and every
rank reads what all ranks knew, so that neither the mesh, nor the number of processes, nor the order
of parameter groups is part of a checkpoint. Hyper-parameters are not in it either: they are the
configuration's, and the schedule is a function of the step.
"""

import logging
import re
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from titan_vlm.config import Checkpoint
from titan_vlm.errors import CheckpointError
from titan_vlm.training import manifest
from titan_vlm.training.history import History, folder_name
from titan_vlm.training.ranks import Ranks, StorageError
from titan_vlm.training.state import (
    Form,
    check_fit,
    create_optimizer_state,
    optimizer_tensors,
    pack,
    random_state,
    set_random_state,
    unpack,
)
from titan_vlm.training.storage import Storage

logger = logging.getLogger(__name__)

# One process without a group is no mistake, and DCP warns of it at every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# What PyTorch says of a peer that died or hangs.
_OF_PEERS = re.compile("gloo|NCCL|Timed out|wait timeout|Connection (closed|reset)")


class Checkpointer:
    """Writes and reads the checkpoints of one run. Every rank makes one and calls it alike.

    Args:
        directory: a path, or an address that fsspec knows.
        config: `[checkpoint]`.
        max_failed_saves: saves that may fail one after the other.
        about: goes into every manifest: configuration, mesh, versions.
        tell: called on every rank with the kind of an event and what belongs to it.
    """

    def __init__(
        self,
        directory: str | Path,
        config: Checkpoint,
        max_failed_saves: int = 3,
        about: dict[str, Any] | None = None,
        tell: Callable[..., None] = lambda kind, **facts: None,
    ):
        self.config, self.max_failed_saves = config, max_failed_saves
        self.about, self.tell = about or {}, tell
        self.storage, self.ranks = Storage(directory), Ranks()
        self.history = History(self.storage, self.ranks, config, tell)
        # A thread begins on device 0, where every rank would then make a context.
        device = (torch.cuda.current_device(),) if torch.cuda.is_initialized() else ()
        self._thread = ThreadPoolExecutor(
            1, "checkpoint", initializer=torch.cuda.set_device if device else None, initargs=device
        )
        self._stager: DefaultStager | None = None
        self._pending: Future | None = None
        self._latest: int | None = None  # the step last saved or loaded here
        self._read: int | None = None  # the step loaded, which pruning must not touch
        self._failed = 0  # saves in a row
        self._why = ""  # the last of them did

    # ------------------------------------------------------------------------ saving

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train: dict[str, Any],
        must: bool = True,
    ) -> None:
        """Save everything as of now; random generators are added to `train` and restored with it.

        With `async_save` this returns once the state is copied to host memory; the files are
        written in a thread. A step saved already is not saved again. A save that the storage fails
        is reported and left to the next one.

        Args:
            train: whatever else resuming needs, tensors and plain Python values, this rank's own.
            must: wait for a save that is still being written; else this one is left out then.

        Raises:
            CheckpointError: too many saves in a row have failed.
        """
        if step == self._latest:
            return
        if not must and self._is_writing():
            if self.ranks.rank == 0:
                logger.warning(
                    "step %d is not saved: the last save is still being written; save less often "
                    "(checkpoint.every) or to a faster disk",
                    step,
                )
            self.tell("failed_save", step=step, why="the last save is still being written")
            return
        self.wait()
        start = time.perf_counter()
        state = {
            "model": get_model_state_dict(model),
            "optimizer": optimizer_tensors(model, optimizer),
            "train": {f"rank{self.ranks.rank}": pack({"caller": train, "random": random_state()})},
        }
        self._latest = step
        if self.config.async_save:
            self._pending = self._thread.submit(self._write, step, self._stage(state), start)
            self._pending.step = step
            return
        self._finish(step, lambda: self._write(step, state, start))

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: as `save`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._finish(pending.step, pending.result)

    def settle(self) -> None:
        """Let a save that is being written come to its end, where an error is about to end the run;
        one of its own is logged."""
        try:
            self.wait()
        except CheckpointError as error:
            logger.warning("%s", error)

    def close(self) -> None:
        """Wait for the last save of a run.

        Raises:
            CheckpointError: it failed, so that what was trained since the one before is lost.
        """
        self.wait()
        self._thread.shutdown()
        if self._stager is not None:
            self._stager.close()
        if self._failed:
            last = self.history.latest()
            raise CheckpointError(
                f"the last save to {self.storage.root} failed: {self._why}; make room or mend it: "
                + (
                    "there is no checkpoint, so that the same command begins anew"
                    if last is None
                    else f"the same command continues from the newest checkpoint, of step {last}"
                )
            )

    def _stage(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of `state` in host memory, in buffers that are used again by the next save."""
        if self._stager is None:
            cuda = torch.cuda.is_available()
            self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        return self._stager.stage(state)

    def _is_writing(self) -> bool:
        """Whether the last save still runs on any rank."""
        if self._pending is None:  # on all ranks alike
            return False
        return self.ranks.any(not self._pending.done())

    def _write(self, step: int, state: dict[str, Any], start: float) -> None:
        """Write, commit, prune; raises on every rank what went wrong on any."""
        name = folder_name(step)
        self.storage.written.clear()
        self.storage.failure = None
        temporary = self.ranks.on_first(lambda: self.storage.temporary(name))
        try:
            dcp.save(state, storage_writer=self.storage.writer(temporary), **self.ranks.for_dcp)
        except CheckpointException as error:  # on every rank, if on any
            if _is_of_peers(error):
                raise
            own = self.storage.failure or _first(error)
            why = self.ranks.union(
                {self.ranks.rank: f"{type(own).__name__}: {own}".splitlines()[0]}
            )
            with suppress(Exception):  # the space that it takes; the next save tries again
                self.ranks.on_first(lambda: self.storage.remove(temporary))
            raise StorageError(_list_ranks(why)) from error
        files = self.ranks.union(self.storage.written)
        content = manifest.make(step, files, {"resume": self.config.resume} | self.about)
        self.ranks.on_first(lambda: self._commit(temporary, name, files, content))
        self.tell(
            "save",
            step=step,
            seconds=round(time.perf_counter() - start, 3),
            bytes=sum(file["bytes"] for file in files.values()) + len(content),
        )
        self.history.prune(but=self._read)

    def _commit(self, temporary: str, name: str, files: dict[str, Any], content: bytes) -> None:
        """Only with the files of all ranks, which may write to other disks than rank 0."""
        if lost := manifest.differences(self.storage, temporary, files, checksums=False):
            raise FileNotFoundError(
                f"of {len(files)} files in {self.storage.path(temporary)} {'; '.join(lost[:3])}: "
                "all nodes must share checkpoint.directory, and no other run may save there"
            )
        self.storage.commit(temporary, name, content)

    def _finish(self, step: int, result: Callable[[], None]) -> None:
        try:
            result()
        except StorageError as error:
            why = str(error)
            self._failed, self._why = self._failed + 1, why
            self._latest = None
            self.tell("failed_save", step=step, why=why)
            if self.ranks.rank == 0:
                logger.warning(
                    "step %d could not be saved (%d in a row): %s; the next save tries again",
                    *(step, self._failed, why),
                )
            if self._failed >= self.max_failed_saves:
                raise CheckpointError(
                    f"{self._failed} saves in a row failed (guards.max_failed_saves), the last "
                    f"with: {why}; make room or mend {self.storage.root}, then run the same "
                    "command again"
                ) from error
            return
        self._failed = 0

    # ------------------------------------------------------------------------ reading

    def newest(self) -> int | None:
        """The newest step whose checkpoint is whole, to go back to within a run.

        Raises:
            CheckpointError: as `save`, for a save that was still being written is waited for.
            ConfigError: all there are are damaged.
        """
        self.wait()
        return self.history.newest_whole()

    def saved(self, step: int) -> set[str]:
        """Names of the model's tensors in the checkpoint of a step."""
        names = self.storage.reader(folder_name(step)).read_metadata().state_dict_metadata
        return {name.removeprefix("model.") for name in names if name.startswith("model.")}

    def read(self, step: int) -> list[dict[str, Any]]:
        """The `train` of each rank that saved; nothing is restored."""
        reader = self.storage.reader(folder_name(step))
        saved = reader.read_metadata().state_dict_metadata
        state = {"train": {f"rank{rank}": b"" for rank in range(_ranks(saved))}}
        dcp.load(state, storage_reader=reader, **self.ranks.for_dcp)
        return [unpack(packed)["caller"] for packed in state["train"].values()]

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
        reader = self.storage.reader(folder_name(step))
        metadata = reader.read_metadata()
        saved = metadata.state_dict_metadata
        model_state = get_model_state_dict(model)
        forms: dict[str, Form] = {f"model.{k}": (x.shape, x.dtype) for k, x in model_state.items()}
        # Of a pipeline, the stages of all ranks.
        check_fit(self.storage.path(folder_name(step)), metadata, self.ranks.union(forms))
        create_optimizer_state(optimizer)
        optimizer_state = {
            # A parameter that never had a gradient has no state in the checkpoint, nor gets one.
            name: tensor
            for name, tensor in optimizer_tensors(model, optimizer).items()
            if f"optimizer.{name}" in saved
        }
        state = {
            "model": model_state,
            "optimizer": optimizer_state,
            "train": {f"rank{rank}": b"" for rank in range(_ranks(saved))},
        }
        # Tensors are filled where they are; the placeholder of `train` is replaced.
        dcp.load(state, storage_reader=reader, **self.ranks.for_dcp)
        for name, parameter in model.named_parameters():
            if f"{name}.step" not in optimizer_state:
                optimizer.state.pop(parameter, None)
        self._latest = self._read = step
        ranks = [unpack(packed) for packed in state["train"].values()]
        if self.ranks.rank < len(ranks):
            set_random_state(ranks[self.ranks.rank]["random"])
        return [rank["caller"] for rank in ranks]


def _ranks(saved: Mapping[str, Any]) -> int:
    """How many processes wrote a checkpoint with these keys."""
    return sum(name.startswith("train.rank") for name in saved)


def _first(error: CheckpointException) -> BaseException:
    """Of DCP's collection of all ranks' errors, the first."""
    return next((first for first, _ in error.failures.values()), error)


def _is_of_peers(error: CheckpointException) -> bool:
    first = _first(error)
    return isinstance(first, RuntimeError) and bool(_OF_PEERS.search(str(first)))


def _list_ranks(why: dict[int, str]) -> str:
    return "; ".join(f"rank {rank}: {text}" for rank, text in list(why.items())[:3])
