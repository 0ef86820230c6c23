"""The run's one sequence of rows, and how samples are packed into them.

    epoch order      a permutation of the source per epoch, one epoch after the other, for ever:
                         j = 0 1 2 3 4 5 6 7 8 ...
    virtual shards   the j-th sample goes to shard j mod V (V = 2: even and odd)
    packing          each shard fills its own rows, first-fit among its `window` oldest samples
    rows             row i of the run is the next row of shard i mod V

Nothing here knows of ranks or workers; they only take turns at shards (loader.py). So the sequence
depends on (seed, V, window, seq_len) alone. First-fit with seq_len 8, window 3:

    pending  a5 b4 c2 | d1 ...      row:  a (5), b does not fit, c (2), d (1)  -> a c d
    pending  b4 e3 f6 | ...         row:  b (4), e (3), ...

A row always starts with the oldest pending sample, so none waits for ever. A shard's state is its
place in the order and the places of what is pending: those samples are encoded again on restore.

Nothing is lost silently. A sample that cannot be encoded, or whose pixels turn out broken when its
row is emitted, is counted as bad and logged with its file and line; an over-long one is dropped or
cut, and counted. Too many bad ones (see `Counts.check`) end the run.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from titan_vlm.data.chat import Sample
from titan_vlm.errors import DataError
from titan_vlm.models.inputs import IGNORE_LABEL

logger = logging.getLogger(__name__)

# A share of bad samples means nothing before this many were seen.
MIN_SEEN = 100
# ... except that a source where all of the first few are bad is simply broken.
MIN_ALL_BAD = 10


@dataclass
class Counts:
    """What became of the samples so far."""

    seen: int = 0
    bad: int = 0
    dropped: int = 0
    cut: int = 0

    def as_list(self) -> list[int]:
        return [self.seen, self.bad, self.dropped, self.cut]

    def __sub__(self, other: "Counts") -> "Counts":
        pairs = zip(self.as_list(), other.as_list(), strict=True)
        return Counts(*(a - b for a, b in pairs))

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(self.as_list(), other.as_list(), strict=True)
        return Counts(*(a + b for a, b in pairs))

    def check(self, max_bad_fraction: float, reason: str) -> None:
        """Raises once more than the allowed share is bad, given enough samples to tell."""
        if self.bad <= max_bad_fraction * self.seen:
            return
        enough = self.seen >= MIN_SEEN or max_bad_fraction == 0
        if enough or self.bad == self.seen >= MIN_ALL_BAD:
            raise DataError(
                f"{self.bad} of {self.seen} samples are bad, more than data.max_bad_fraction = "
                f"{max_bad_fraction} allows; the last: {reason}"
            )


class EpochOrder:
    """Position j of the endless order -> index of a source (epoch * size + slot)."""

    def __init__(self, size: int, seed: int):
        if size == 0:
            raise DataError("the source has no samples")
        self.size, self.seed = size, seed

    def __getitem__(self, position: int) -> int:
        epoch, slot = divmod(position, self.size)
        return epoch * self.size + int(epoch_permutation(self.size, self.seed, epoch)[slot])


@lru_cache(maxsize=2)  # shards do not enter an epoch at the same time
def epoch_permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


class Shard:
    """One virtual shard: endless packed rows, each a list of samples."""

    def __init__(
        self,
        number: int,
        shards: int,
        fetch: Callable[[int], Sample],
        seq_len: int,
        window: int = 16,
        overlong: str = "drop",
        on_bad: Callable[[str], None] | None = None,
    ):
        self.number, self.shards, self.fetch = number, shards, fetch
        self.seq_len, self.window, self.overlong = seq_len, window, overlong
        self.on_bad = on_bad
        self.cursor = number  # position in the order of the next sample of this shard
        self.pending: deque[tuple[int, Sample]] = deque()
        self.counts = Counts()

    def next_row(self) -> list[Sample]:
        row, space = [], self.seq_len
        while True:
            while len(self.pending) < self.window:
                self._pull()
            fits = (k for k, (_, sample) in enumerate(self.pending) if len(sample) <= space)
            k = next(fits, None)
            if k is None:
                return row
            _, sample = self.pending[k]
            del self.pending[k]
            row.append(sample)
            space -= len(sample)

    def _pull(self) -> None:
        """Encodes the next sample of the order into the window, or counts why not."""
        position = self.cursor
        self.cursor += self.shards
        self.counts.seen += 1
        sample = self._encode(position)
        if sample is None:
            return
        if len(sample) > self.seq_len:
            kept = cut_sample(sample, self.seq_len) if self.overlong == "cut" else None
            if kept is None:
                self._drop(sample)
                return
            self.counts.cut += 1
            sample = kept
        self.pending.append((position, sample))

    def _drop(self, sample: Sample) -> None:
        self.counts.dropped += 1
        tokens = f"{len(sample)} tokens, training.seq_len = {self.seq_len}"
        logger.info("dropped %s: %s", sample.origin, tokens)
        if self.counts.dropped + self.counts.bad == self.counts.seen >= MIN_SEEN:
            raise DataError(
                f"none of the first {self.counts.seen} samples fits into a row; the last, "
                f"{sample.origin}, has {tokens}: raise it, or lower data.max_pixels"
            )

    def _encode(self, position: int) -> Sample | None:
        try:
            return self.fetch(position)
        except DataError as error:
            self.bad(str(error))
            return None

    def bad(self, reason: str) -> None:
        self.counts.bad += 1
        logger.warning("skipped %s", reason)
        if self.on_bad is not None:
            self.on_bad(reason)

    def state_dict(self) -> dict:
        return {
            "cursor": self.cursor,
            "pending": [position for position, _ in self.pending],
            "counts": self.counts.as_list(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.cursor = state["cursor"]
        self.counts = Counts(*state["counts"])
        self.pending.clear()
        for position in state["pending"]:
            sample = self._encode(position)
            if sample is not None and len(sample) > self.seq_len:
                sample = cut_sample(sample, self.seq_len)
            if sample is not None:
                self.pending.append((position, sample))


def cut_sample(sample: Sample, length: int) -> Sample | None:
    """The first `length` tokens, fewer where a picture would be cut; None if no target is left."""
    for visual in sample.visuals:
        if visual.start < length < visual.end:
            # One less: the token that opens the picture goes too.
            length = max(visual.start - 1, 0)
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
    )
