"""A step that goes wrong: skipped on every rank, and where that does not help, rolled back.

    step      98   99  100  101  102  103  104
    rows      g    h    i    j    k    l    m       x: loss, gradient norm or router logits are not
                      saved   x    x    x           finite, or a spike

    skipped   `run.step` goes on and the rows count as read; weights, optimizer and routers stay
    rolled    after `guards.max_skips` in a row (here 3): everything is again as of the checkpoint,
    back      once; the rows j, k and l are read and thrown away, and the run goes on:

    step      98   99  100  101  102
    rows      g    h    i    m    n     saved after the first good step, so that a killed run
                                        passes over j, k and l, too

What is decided follows from sums over all ranks and from a state that is saved with the weights:
every rank decides the same, and so does a resumed run. While steps are being skipped nothing is
saved; what was due is saved after the next good one.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from titan_vlm.config import Guards
from titan_vlm.data.loader import RowLoader
from titan_vlm.data.rows import Row
from titan_vlm.errors import DataError, NumericsError, ReadError
from titan_vlm.mesh import Mesh, rank

logger = logging.getLogger("titan_vlm")
MIN_SEEN = 20  # steps before which nothing is a spike
MOST_NAMED = 20  # samples in one message
TO_SIGMA = 1.4826  # median absolute deviations of a normal distribution in one of its sigmas


class Signals(NamedTuple):
    """What a step is judged by, the same on all ranks: loss, gradient norm, and the layers of which
    a router's logits were not finite."""

    loss: float
    norm: float
    broken: list[str]


def read_signals(
    loss: Tensor, norm: Tensor, broken_L: Tensor, layers: Iterable[str], mesh: Mesh
) -> Signals:
    """Sums over all ranks, read in the one wait for the device that a step has.

    Args:
        loss: this rank's share; ranks along `tp` have the same one, along `pp` one stage has it.
        norm: of the gradients of all ranks.
        broken_L: for each of `layers`, above 0 where this rank has seen such logits.
    """
    share = loss.double().reshape(1)
    flat = torch.cat([share if rank(mesh.tp) == 0 else torch.zeros_like(share), broken_L])
    if dist.get_world_size() > 1:
        dist.all_reduce(flat)  # everyone with everyone: 8 bytes, and 8 for each layer
    loss_sum, *flags, norm_value = torch.cat([flat, norm.to(flat).reshape(1)]).tolist()
    return Signals(
        loss_sum, norm_value, [name for name, flag in zip(layers, flags, strict=True) if flag]
    )


def have_same_rows(rows: list[Row], mesh: Mesh) -> bool:
    """Whether the ranks along tp and pp do, which read the same rows each by itself: else they
    would work on different pictures, or wait for each other for ever. Sends 16 bytes along each."""
    names = "\n".join(" ".join(row.sample_ids) for row in rows).encode()
    digest = int.from_bytes(hashlib.blake2b(names, digest_size=7).digest())
    ends = torch.tensor([digest, -digest])  # the highest, and the negative of the lowest
    for view in (mesh.tp, mesh.pp):
        if view is not None:
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=view.get_group())
    return ends.sum().item() == 0


@dataclass
class State:
    """What a checkpoint keeps.

    losses, norms   of the last updates, newest last
    skipped_steps, passed_rows, rollbacks   since the run began; steps rolled back are not in it
    avoid           rows to pass over: (first, end) in the run's sequence
    streak          the steps skipped since the last update: step, why, rows, samples
    passed_at       the step after which the last rollback passed over rows
    settled         whether a checkpoint was due and written since: else it is the same stretch
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    passed_rows: int = 0
    rollbacks: int = 0
    avoid: list[tuple[int, int]] = field(default_factory=list)
    streak: list[dict[str, Any]] = field(default_factory=list)
    passed_at: int = -1
    settled: bool = True


class Guard:
    """Judges every step of a run. Every rank makes one and calls it alike.

    Args:
        config: `[guards]`.
        tell: called on every rank with the kind of an event ("skip", "spike", "rollback") and
            what belongs to it: step, why, samples.
    """

    def __init__(
        self, config: Guards, tell: Callable[..., None] = lambda kind, **facts: None
    ) -> None:
        self.config, self.tell = config, tell
        self.state = State()
        self._span = (0, 0)  # rows of the step under way
        self._owed = False  # a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """None: of a run that had no guard."""
        self.state = State(**(state or {}))

    def counts(self) -> dict[str, int]:
        """For the metrics."""
        state = self.state
        return {
            name: getattr(state, name) for name in ("skipped_steps", "passed_rows", "rollbacks")
        }

    def begin_stage(self) -> None:
        """From now on a loss or norm is compared with those of this stage alone."""
        self.state.losses, self.state.norms = [], []

    # ------------------------------------------------------------------------ a step

    def take(self, loader: RowLoader, count: int) -> list[Row]:
        """This rank's next `count` rows, but for those to pass over, which are read and logged.

        All ranks pass over a round, one row of each, or none of them does.
        """
        rows, passed, ranks = [], [], loader.rows.ranks
        while len(rows) < count:
            first = loader.rows.consumed
            row = next(loader)
            if any(a < first + ranks and first < b for a, b in self.state.avoid):
                passed.append(row)
                continue
            if not rows:
                self._span = (first, first)
            rows.append(row)
        self._span = (self._span[0], loader.rows.consumed)
        if passed:
            self.state.passed_rows += len(passed) * ranks
            _warn("passed over %d rows: %s", len(passed) * ranks, _list(sample_ids(passed)))
        return rows

    def try_to_take(
        self, loader: RowLoader, count: int
    ) -> tuple[list[Row], DataError | ReadError | None]:
        """No rows and the error, for all ranks to be told, where this one cannot read its own."""
        try:
            return self.take(loader, count), None
        except (DataError, ReadError) as error:
            return [], error

    def judge(self, step: int, signals: Signals, rows: list[Row]) -> bool:
        """Whether the update of `step` is made; else the step is skipped, counted and told.

        Args:
            rows: this rank's.
        """
        state, config = self.state, self.config
        spike = ""
        if not (why := not_finite(signals)):
            spike = self._spike(signals)
            why = spike if config.on_spike == "skip" else ""
        if not why:
            if spike:
                samples = sample_ids(rows)
                self.tell("spike", step=step, why=spike, samples=samples)
                _warn("step %d: %s; samples: %s", step, spike, _list(samples))
            state.losses = [*state.losses, signals.loss][-config.spike_window :]
            state.norms = [*state.norms, signals.norm][-config.spike_window :]
            state.streak = []
            return True
        bad = {"step": step, "why": why, "rows": self._span, "samples": sample_ids(rows)}
        state.streak = [*state.streak, bad]
        if config.max_skips:
            state.skipped_steps += 1
            self.tell("skip", step=step, why=why, samples=bad["samples"])
            _warn(
                "step %d is skipped (%d in a row): %s; samples: %s",
                *(step, len(state.streak), why, _list(bad["samples"])),
            )
        return False

    def _spike(self, signals: Signals) -> str:
        """What is a spike, in words; "" if nothing is."""
        limit, state = self.config.spike_zscore, self.state
        if not limit or len(state.losses) < MIN_SEEN:
            return ""
        found = [
            f"{name} {value:.4g} is a spike: {z:.1f} robust deviations above the median "
            f"{median(history):.4g} of the last {len(history)} updates"
            for name, value, history in (
                ("loss", signals.loss, state.losses),
                ("gradient norm", signals.norm, state.norms),
            )
            if (z := robust_z(value, history)) > limit
        ]
        return ", ".join(found)

    # ------------------------------------------------------------------------ what follows

    @property
    def gives_up(self) -> bool:
        """Whether as many steps in a row were skipped as may be."""
        return len(self.state.streak) >= max(self.config.max_skips, 1)

    def may_save(self, step: int, due: bool) -> bool:
        """Whether a checkpoint is written after `step`, at which one is `due` or not."""
        self._owed |= due
        if self.state.streak or not self._owed:
            return False
        self._owed = False
        # That of the first good step after a rollback is not due; it ends no stretch.
        self.state.settled |= due and step > self.state.passed_at
        return True

    def check_rollback(self, checkpoint: int | None) -> None:
        """Raises where there is no way back.

        Args:
            checkpoint: step of the newest one; None: there is none.

        Raises:
            NumericsError: says what went wrong at which steps, and what to try.
        """
        streak, most = self.state.streak, self.config.max_skips
        last = "there is none" if checkpoint is None else f"it is of step {checkpoint}"
        if most and checkpoint is None:
            last = "there is none to roll back to (checkpoint.every)"
        # A save that was due may have been left out or failed.
        anew = self.state.settled and (checkpoint or 0) > self.state.passed_at
        if most and checkpoint is not None and anew:
            return
        again = " again, after a rollback" if most and not anew else ""
        many = f"{len(streak)} steps in a row are bad{again} (guards.max_skips = {most}): "
        samples = dict.fromkeys(name for bad in streak for name in bad["samples"])
        raise NumericsError(
            (many if most else "")
            + "; ".join(f"step {bad['step']}: {bad['why']}" for bad in streak)
            + f"; the weights are still those of step {streak[0]['step'] - 1}; last good "
            f"checkpoint: {last}; try a lower optimizer.lr, a smaller training.max_norm, or the "
            f"data without some of these samples: {_list(list(samples))}"
        )

    def rolled_back(self, before: State, checkpoint: int) -> None:
        """Call when everything is as of the `checkpoint`, this guard's state too: from now on pass
        over the rows of the steps that were skipped.

        Args:
            before: the state that led here.
        """
        state, streak = self.state, before.streak
        state.avoid = sorted({*map(tuple, before.avoid), *(tuple(bad["rows"]) for bad in streak)})
        state.rollbacks = before.rollbacks + 1
        state.streak, state.settled = [], False
        state.passed_at = streak[0]["step"] - 1
        self._owed = True
        samples = list(dict.fromkeys(name for bad in streak for name in bad["samples"]))
        why = f"{len(streak)} steps in a row were skipped, the last because {streak[-1]['why']}"
        self.tell("rollback", step=checkpoint, why=why, samples=samples)
        _warn(
            "rolled back to step %d: %s; the rows of steps %d to %d will be passed over",
            *(checkpoint, why, streak[0]["step"], streak[-1]["step"]),
        )


# ---------------------------------------------------------------------------- what is wrong


def not_finite(signals: Signals) -> str:
    """What is not finite, in words; "" if all is."""
    found = []
    if broken := signals.broken:
        others = f" and of {len(broken) - 1} other layers" if len(broken) > 1 else ""
        found.append(f"router logits of {broken[0]}{others} are not finite")
    for name, value in (("loss", signals.loss), ("gradient norm", signals.norm)):
        if not math.isfinite(value):
            found.append(f"{name} is {value}")
    return ", ".join(found)


def robust_z(value: float, history: Sequence[float]) -> float:
    """How far above the median, in sigmas as the median absolute deviation estimates them; 0 where
    more than half of the history is one number, which says nothing of what is usual."""
    centre = median(history)
    spread = TO_SIGMA * median(abs(x - centre) for x in history)
    return (value - centre) / spread if spread else 0.0


def sample_ids(rows: list[Row]) -> list[str]:
    """Those in the rows of all ranks, which all call this."""
    own = [name for row in rows for name in row.sample_ids]
    of_ranks: list[list[str]] = [own] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    # Ranks along tp and pp have the same rows.
    return list(dict.fromkeys(name for names in of_ranks for name in names))


def _list(samples: list[str]) -> str:
    more = f" and {len(samples) - MOST_NAMED} more" if len(samples) > MOST_NAMED else ""
    return ", ".join(samples[:MOST_NAMED]) + more


def _warn(message: str, *values: Any) -> None:
    """On one rank: all of them have come to the same."""
    if dist.get_rank() == 0:
        logger.warning(message, *values)
