"""The run's one sequence of rows, and how samples are packed into them.

    epoch order      a permutation of a source per epoch, one epoch after the other, for ever:
                         j = 0 1 2 3 4 5 6 7 8 ...
    virtual shards   the j-th sample goes to shard j mod V (V = 2: even and odd), and so in every
                     source; a shard chooses among them by itself (mixture.py)
    packing          each shard fills its own rows, first-fit among its `window` oldest samples
    rows             row i of the run is the next row of shard i mod V

Nothing here knows of ranks or workers; they only take turns at shards (loader.py). So the sequence
depends on (seed, V, window, seq_len) and the sources alone. First-fit with seq_len 8, window 3:

    pending  a5 b4 c2 | d1 ...      row:  a (5), b does not fit, c (2), d (1)  -> a c d
    pending  b4 e3 f6 | ...         row:  b (4), e (3), ...

A row always starts with the oldest pending sample, so none waits for ever. A shard's state is its
places in the orders and those of what is pending: those samples are encoded again on restore. When
every source is through its epochs, a shard empties its window; from then on its rows are empty.

Nothing is lost silently. A sample that cannot be encoded, or whose pixels turn out broken when its
row is emitted, is counted as bad and logged with its file and line; an over-long one is dropped or
cut, and counted. The trainer ends the run where too many of the whole run are bad
(`Counts.too_many_bad`); a shard ends it only where it finds nothing to use any more.
"""

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass

from titan_vlm.data.chat import Sample
from titan_vlm.data.mixture import Mixture, Turns
from titan_vlm.errors import DataError
from titan_vlm.models.inputs import IGNORE_LABEL

logger = logging.getLogger(__name__)

# A share of bad samples means nothing before this many were seen.
MIN_SEEN = 100
# Samples in a row that cannot be used, after which a shard gives up. At the start that is a wrong
# setting; later a source of which most is dropped can have long runs of them by chance.
MAX_USELESS_AT_START = 100
MAX_USELESS = 1000


@dataclass
class Counts:
    """What became of samples: all that were read, and those left out or cut among them; and what
    has gone into rows. The others wait in a window."""

    seen: int = 0
    bad: int = 0
    dropped: int = 0
    cut: int = 0
    samples: int = 0
    tokens: int = 0

    def as_list(self) -> list[int]:
        return list(astuple(self))

    def __sub__(self, other: "Counts") -> "Counts":
        pairs = zip(self.as_list(), other.as_list(), strict=True)
        return Counts(*(a - b for a, b in pairs))

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(self.as_list(), other.as_list(), strict=True)
        return Counts(*(a + b for a, b in pairs))

    def too_many_bad(self, max_bad_fraction: float) -> bool:
        """Whether more than the allowed share is bad, and that is no chance.

        It is asked at every step: without a margin (three standard deviations of the number that
        are bad where exactly the allowed share is) some step of a long run would always say yes.
        """
        allowed = max_bad_fraction * self.seen
        margin = 3 * math.sqrt(allowed * (1 - max_bad_fraction))
        enough = self.seen >= MIN_SEEN or max_bad_fraction == 0
        return enough and self.bad > allowed + margin


class Shard:
    """One virtual shard: endless packed rows, each a list of samples.

    Args:
        fetch: (member of the mixture, position in its order) -> sample.
    """

    def __init__(
        self,
        number: int,
        shards: int,
        mixture: Mixture,
        fetch: Callable[[int, int], Sample],
        seq_len: int,
        window: int = 16,
        overlong: str = "drop",
    ):
        self.mixture, self.fetch = mixture, fetch
        self.seq_len, self.window, self.overlong = seq_len, window, overlong
        self.turns = Turns(mixture, number, shards)
        self.pending: deque[tuple[int, int, Sample]] = deque()  # with member and position
        self.counts = [Counts() for _ in mixture.members]
        # Of samples left out, until somebody takes them: why, and their ids.
        self.reasons: list[str] = []
        self.skipped: list[str] = []
        # Samples in a row without use: 0 whenever a row is complete, so no part of the state.
        self.useless = 0

    def next_row(self) -> list[Sample]:
        """The samples of the next row; none where every source is through its epochs."""
        row, space = [], self.seq_len
        while True:
            while len(self.pending) < self.window and self._pull():
                pass
            fits = (k for k, (_, _, sample) in enumerate(self.pending) if len(sample) <= space)
            k = next(fits, None)
            if k is None:
                return row
            _, _, sample = self.pending[k]
            del self.pending[k]
            row.append(sample)
            space -= len(sample)

    def _pull(self) -> bool:
        """Encodes the next sample into the window, or counts why not; False where none is left."""
        turn = self.turns.next()
        if turn is None:
            return False
        member, position = turn
        counts = self.counts[member]
        counts.seen += 1
        sample = self._encode(member, position)
        if sample is None:
            self._go_without(self.reasons[-1])
            return True
        kept = self._fit(sample)
        if kept is None:
            reason = self._drop(member, sample)
            self._go_without(f"{reason}: raise it, or lower data.max_pixels")
            return True
        counts.cut += kept is not sample
        self.useless = 0
        self.turns.take(member, len(kept))
        self.pending.append((member, position, kept))
        return True

    def _fit(self, sample: Sample) -> Sample | None:
        if len(sample) <= self.seq_len:
            return sample
        return cut_sample(sample, self.seq_len) if self.overlong == "cut" else None

    def _drop(self, member: int, sample: Sample) -> str:
        """Count, name and log it; returns why."""
        self.counts[member].dropped += 1
        self.skipped.append(sample.id)
        reason = f"{sample.origin}: {len(sample)} tokens, training.seq_len = {self.seq_len}"
        logger.info("dropped %s", reason)
        return reason

    def _go_without(self, reason: str) -> None:
        """Raises rather than search a source for ever in which nothing can be used."""
        self.useless += 1
        at_start = self.useless == sum(counts.seen for counts in self.counts)
        if self.useless == (MAX_USELESS_AT_START if at_start else MAX_USELESS):
            where = "first" if at_start else "last"
            raise DataError(
                f"none of the {where} {self.useless} samples can be used; the last: {reason}"
            )

    def _encode(self, member: int, position: int) -> Sample | None:
        try:
            return self.fetch(member, position)
        except DataError as error:
            self.bad(member, self.mixture.id(member, position), str(error))
            return None

    def count_row(self, members: list[int], lengths: list[int]) -> None:
        """What has gone into a row: of each sample, its member and its length."""
        for member, length in zip(members, lengths, strict=False):  # the padding is a length too
            self.counts[member].samples += 1
            self.counts[member].tokens += length

    def bad(self, member: int, id: str, reason: str) -> None:
        self.counts[member].bad += 1
        self.skipped.append(id)
        self.reasons.append(reason)
        logger.warning("skipped %s", reason)

    def state_dict(self) -> dict:
        return self.turns.state_dict() | {
            "pending": [[member, position] for member, position, _ in self.pending],
            "counts": [counts.as_list() for counts in self.counts],
        }

    def load_state_dict(self, state: dict) -> None:
        """What was pending is encoded again. Where settings have changed in between (another stage
        of a curriculum) it may have become too long and is dropped, or is cut another way."""
        self.turns.load_state_dict(state)
        self.counts = [Counts(*counts) for counts in state["counts"]]
        self.pending.clear()
        for member, position in state["pending"]:
            sample = self._encode(member, position)
            kept = self._fit(sample) if sample is not None else None
            if kept is not None:
                self.pending.append((member, position, kept))
            elif sample is not None:
                self._drop(member, sample)


def cut_sample(sample: Sample, length: int) -> Sample | None:
    """The first `length` tokens, fewer where a picture would be cut; None if no target is left."""
    for visual in sample.visuals:
        if visual.opening < length < visual.closing:
            length = visual.opening
    labels_L = sample.labels_L[:length].copy()
    labels_L[-1:] = IGNORE_LABEL  # its target is the first token that was cut away
    if not (labels_L != IGNORE_LABEL).any():
        return None
    return Sample(
        sample.id,
        sample.origin,
        sample.tokens_L[:length],
        labels_L,
        sample.positions_3L[:, :length],
        sample.visual_L[:length],
        [visual for visual in sample.visuals if visual.end <= length],
        sample.meta,
        sample.source,
    )
