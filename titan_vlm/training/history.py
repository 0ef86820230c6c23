"""The checkpoints that a run has: which there are, which are whole, which one to go on from."""

import logging
import platform
from collections.abc import Callable
from contextlib import suppress

from titan_vlm import launched
from titan_vlm.config import Checkpoint
from titan_vlm.errors import ConfigError
from titan_vlm.training import manifest
from titan_vlm.training.ranks import Ranks, StorageError
from titan_vlm.training.storage import FOLDER, Storage

logger = logging.getLogger(__name__)


class History:
    """What lies in a run's folder of checkpoints. Every rank makes one and calls it alike.

    Args:
        tell: called on every rank with the kind of an event and what belongs to it.
    """

    def __init__(
        self, storage: Storage, ranks: Ranks, config: Checkpoint, tell: Callable[..., None]
    ):
        self.storage, self.ranks, self.config, self.tell = storage, ranks, config, tell
        self._later: list[int] = []  # than the step that the run goes back to

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first."""
        names = self.storage.names()
        steps = [int(match[1]) for name in names if (match := FOLDER.fullmatch(name))]
        if self.storage.is_local:
            return sorted(steps)
        return sorted(s for s in steps if manifest.NAME in self.storage.names(folder_name(s)))

    def latest(self) -> int | None:
        """Step of the newest committed checkpoint, or None."""
        return max(self.steps(), default=None)

    def find(self) -> int | None:
        """The step to resume from, as `checkpoint.resume` says; None to begin anew.

        Every file of the checkpoint is compared with its manifest, ranks taking turns. A damaged
        one is named and set aside, and the one before is tried.

        Raises:
            ConfigError: the step asked for is not there; or all there were are damaged; or there
                are some where none may be; or ranks do not share the folder, or cannot write there.
        """
        try:
            self.ranks.on_first(self.storage.prepare)
            self._check_shared()
        except StorageError as error:
            raise ConfigError(
                f"checkpoint.directory = {self.storage.root}: {error}; name a folder that can be "
                "written"
            ) from error
        steps, resume = self.ranks.on_first(self.steps), self.config.resume
        # On any rank: a node that joins, or comes in place of another, has not begun before.
        if resume == "none" and steps and not self.ranks.any(launched.is_restart()):
            raise ConfigError(
                f'checkpoint.resume = "none": {self.storage.root} has checkpoints (newest: step '
                f'{steps[-1]}); use another run.output_dir, or "auto" to continue'
            )
        if resume.isdecimal():
            if not self.ranks.on_first(lambda: self._went_back(int(resume), steps)):
                return self._find_step(int(resume), steps)
            if self.ranks.rank == 0:
                logger.warning(
                    'checkpoint.resume = "%s" was done before: going on from the newest '
                    "checkpoint; to go back again, move those after that step out of %s",
                    *(resume, self.storage.root),
                )
        return self.newest_whole(steps)

    def _check_shared(self) -> None:
        """Whether all ranks see a file that rank 0 leaves."""
        if self.ranks.size == 1:
            return
        token, own = self.ranks.on_first(self.storage.leave_token), {}
        try:
            self.storage.see(token)
        except Exception as error:  # of whatever kind, on this rank alone
            own[self.ranks.rank] = f"on {platform.node()} ({type(error).__name__}: {error})"
        blind = self.ranks.union(own)
        self.ranks.on_first(lambda: self.storage.rm_file(self.storage.path(token)))
        if blind:
            more = f" and {len(blind) - 3} more" if len(blind) > 3 else ""
            names = ", ".join(f"rank {rank} {where}" for rank, where in list(blind.items())[:3])
            raise ConfigError(
                f"checkpoint.directory = {self.storage.root}: {names}{more} cannot see what rank 0 "
                "wrote there; name a folder that all nodes share"
            )

    def newest_whole(self, steps: list[int] | None = None) -> int | None:
        """The newest step whose checkpoint is whole, of all or of `steps`; damaged ones that are
        newer are set aside.

        Raises:
            ConfigError: all there are are damaged.
        """
        if steps is None:
            steps = self.ranks.on_first(self.steps)
        damaged: dict[int, list[str]] = {}
        for step in reversed(steps):
            if not (found := self.problems(step)):
                self._set_aside(damaged)
                return step
            damaged[step] = found
        if damaged:
            raise ConfigError(
                f"all checkpoints in {self.storage.root} are damaged: {_list(damaged)}; restore "
                "one of them, or move them away to begin anew"
            )
        return None

    def problems(self, step: int) -> list[str]:
        """What is wrong with the checkpoint of a step, on any rank; every rank gets the same."""
        ranks = self.ranks
        own = manifest.problems(self.storage, folder_name(step), turn=ranks.rank, turns=ranks.size)
        return list(ranks.union(dict.fromkeys(own)))

    def prune(self, but: int | None) -> None:
        """Remove what `[checkpoint]` does not keep, except step `but`; a failure costs space
        only."""
        if self.ranks.rank != 0 or not self.config.keep_latest_k:
            return
        every = self.config.keep_every
        try:
            for step in self.steps()[: -self.config.keep_latest_k]:
                if step != but and not (every and step % every == 0):
                    self.storage.remove(folder_name(step))
        except Exception as error:  # of whatever kind, on this rank alone
            logger.warning("old checkpoints in %s remain: %s", self.storage.root, error)

    def _set_aside(self, damaged: dict[int, list[str]]) -> None:
        for step, found in damaged.items():
            aside = self._rename(step, "damaged")
            self.tell("damaged", step=step, problems=found, kept_as=aside)
            if self.ranks.rank == 0:
                logger.warning(
                    "damaged checkpoint of %s; it is kept as %s and the one before is used",
                    *(_list({step: found}), aside),
                )

    def _rename(self, step: int, why: str) -> str:
        return self.ranks.on_first(lambda: self.storage.set_aside(folder_name(step), why))

    def _went_back(self, step: int, steps: list[int]) -> bool:
        """Whether this command has gone back to `step` before: then it goes on, like any other."""
        for later in steps:
            if later > step:
                with suppress(OSError, ValueError):
                    resume = str(manifest.read(self.storage, folder_name(later)).get("resume"))
                    if resume.isdecimal() and int(resume) == step:
                        return True
        return False

    def _find_step(self, step: int, steps: list[int]) -> int:
        if step not in steps:
            raise ConfigError(
                f'checkpoint.resume = "{step}": {self.storage.root} has '
                f"{', '.join(map(str, steps)) or 'none'}"
            )
        if found := self.problems(step):
            raise ConfigError(
                f'checkpoint.resume = "{step}": that checkpoint is damaged: {"; ".join(found[:3])}'
            )
        self._later = steps[steps.index(step) + 1 :]
        return step

    def go_back(self) -> None:
        """Set aside what is later than the step that `find` was told to go back to, or "auto" would
        go on from there. To be called when nothing refuses the start any more."""
        for later in self._later:
            aside = self._rename(later, "abandoned")
            self.tell("abandoned", step=later, kept_as=aside)
            if self.ranks.rank == 0:
                step = int(self.config.resume)
                logger.info("going back to step %d: step %d is kept as %s", step, later, aside)
        self._later = []


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def _list(damaged: dict[int, list[str]]) -> str:
    return " | ".join(f"step {step}: {'; '.join(found[:3])}" for step, found in damaged.items())
