"""Who makes which row: ranks and workers take turns at the virtual shards.

Row i of the run goes to rank i mod R; of a rank's rows, one after the other, worker w makes every
W-th. Both follow from i alone and V is a multiple of R x W, so each shard has one owner:

    V = 8, R = 2, W = 2      row     0   1   2   3   4   5   6   7   8 ...
                             shard   0   1   2   3   4   5   6   7   0
                             rank    0   1   0   1   0   1   0   1   0
                             worker  0   0   1   1   0   0   1   1   0

The state of a loader is the number of rows the run has consumed, the state of every shard this
rank owns, and what the sequence depends on, which must not change. It names no rank and no worker:
the union over the ranks (`merge_states`) restores under any R and W. torchdata's
StatefulDataLoader keeps a snapshot of every worker as of the last row handed out, however far the
workers have read ahead; ours gathers the shards from those.
"""

import os
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_vlm.data.chat import Encoder, Sample
from titan_vlm.data.images import VisualSpec
from titan_vlm.data.mixture import Mixture, build_mixture
from titan_vlm.data.packing import Counts, Shard
from titan_vlm.data.rows import Row, make_row
from titan_vlm.data.workers import shield
from titan_vlm.errors import ConfigError, DataError, ReadError

SHARDS = "shards"  # marks our part of a snapshot, wherever torchdata keeps it
MAX_REASONS = 3  # examples that an error shows of what is bad


def build_loader(
    config,
    tokenizer,
    spec: VisualSpec,
    dp_rank: int = 0,
    dp_size: int = 1,
    opened: Mixture | None = None,
) -> "RowLoader":
    """The endless training rows of one rank, as `[data]`, `[training]` and `run.seed` say.

    Args:
        opened: of another stage of the run, which has the same sources.
    """
    data = config.data
    rows = PackedRows(
        build_mixture(data, config.run.seed, opened),
        Encoder(tokenizer, spec),
        seq_len=config.training.seq_len,
        virtual_shards=data.virtual_shards,
        window=data.pack_window,
        overlong=data.overlong,
        rank=dp_rank,
        ranks=dp_size,
    )
    return RowLoader(rows, data.num_workers)


class RowLoader:
    """Iterate for rows; `state_dict` and `counts` are as of the last row handed out."""

    def __init__(self, rows: "PackedRows", num_workers: int = 0):
        check_shards(rows.virtual_shards, rows.ranks, num_workers)
        self.rows, self.num_workers = rows, num_workers
        self.loader = self.iterator = None
        # Of this rank's rows since the run began, by source.
        self.counts_of = [Counts() for _ in rows.mixture.members]
        self.ended = 0  # the last rows that came from shards without samples
        self.reasons: deque[str] = deque(maxlen=MAX_REASONS)  # why the last bad samples are bad

    @property
    def counts(self) -> Counts:
        return sum(self.counts_of, Counts())

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        if self.iterator is None:
            self._start()
        row = next(self.iterator)
        if isinstance(row, DataError | ReadError):
            raise row
        self.rows.consumed += self.rows.ranks
        self.counts_of = [a + b for a, b in zip(self.counts_of, row.counts_of, strict=True)]
        self.ended = self.ended + 1 if row.ended else 0
        self.reasons += row.reasons
        return row

    def _start(self) -> None:
        if self.num_workers:
            # Before the fork: else the tokenizers library warns in every worker.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with warnings.catch_warnings():
            # torchdata's call of a function that torch has deprecated; nothing to do here.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            self.loader = StatefulDataLoader(
                self.rows,
                batch_size=None,
                num_workers=self.num_workers,  # each runs a single torch thread
                collate_fn=as_is,
                worker_init_fn=shield,
                snapshot_every_n_steps=1,
                # Its seed must not come from the generator that a checkpoint restores.
                generator=torch.Generator(),
            )
        self.iterator = iter(self.loader)

    def state_dict(self) -> dict:
        """Rows consumed by the whole run, what its sequence depends on, where the data were, this
        rank's shards."""
        shards = dict(self.rows.initial)
        if self.iterator is not None:
            shards |= find_shards(self.loader.state_dict())
        return {
            "rows": self.rows.consumed,
            "sequence": self.rows.sequence,
            "paths": self.rows.mixture.paths(),
            SHARDS: shards,
        }

    def load_state_dict(self, state: dict) -> list[Counts]:
        """Takes a state of any number of ranks and workers; the next row follows its last. Returns
        the counts of the whole run, by source."""
        self.close()
        self.rows.restore(state)
        self.counts_of = total_counts(self.rows.initial, len(self.counts_of))
        self.ended = 0
        self.reasons.clear()
        return total_counts(state[SHARDS], len(self.counts_of))

    def go_on_from(self, before: "RowLoader") -> None:
        """Take over the sequence of samples from the loader of the stage before: nothing is lost
        or seen twice, and what waits in a window is encoded again under the new settings."""
        state = before.state_dict()
        before.close()
        self.load_state_dict(state | {"sequence": self.rows.sequence})

    def close(self) -> None:
        """Ends the workers."""
        self.loader = self.iterator = None


class PackedRows(IterableDataset):
    """The rows of one rank; in a worker process, of that worker."""

    def __init__(
        self,
        mixture: Mixture,
        encoder: Encoder,
        *,
        seq_len: int,
        virtual_shards: int = 16,
        window: int = 16,
        overlong: str = "drop",
        rank: int = 0,
        ranks: int = 1,
    ):
        self.mixture, self.encoder, self.seq_len = mixture, encoder, seq_len
        self.virtual_shards, self.window, self.overlong = virtual_shards, window, overlong
        self.rank, self.ranks = rank, ranks
        # Another value of any of these, and what comes next has been seen or is never seen.
        self.sequence = {
            "data.virtual_shards": virtual_shards,
            "data.pack_window": window,
            "training.seq_len": seq_len,
            "run.seed": mixture.seed,
        } | mixture.sequence()
        self.consumed = 0
        self.initial: dict[int, dict] = {}

    def restore(self, state: dict) -> None:
        for key in self.sequence | state["sequence"]:
            present, saved = self.sequence.get(key), state["sequence"].get(key)
            if present != saved:
                if present is None or saved is None:  # of a mixture, or of one source only
                    key, present, saved = "[data]", *map(_named, (self.sequence, state["sequence"]))
                raise ConfigError(
                    f"{key} = {present}, but the run to resume began with {saved} and its sequence "
                    f"of rows depends on it; go back to {saved}, or use another run.output_dir"
                )
        self.mixture.note_moves(state["paths"])
        if state["rows"] % self.ranks:
            raise ConfigError(
                f"resume after {state['rows']} rows on {self.ranks} data-parallel ranks: the rows "
                "must divide evenly; use a number of ranks that divides global_batch_size"
            )
        self.consumed = state["rows"]
        self.initial = {
            int(number): shard  # a state kept as JSON has texts for keys
            for number, shard in state[SHARDS].items()
            if int(number) % self.ranks == self.rank
        }

    def __iter__(self) -> "RowIterator":
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        return RowIterator(self, turn, turns)

    def fetch(self, member: int, position: int) -> Sample:
        mixture = self.mixture
        raw = mixture.members[member].source[mixture.orders[member][position]]
        sample = self.encoder.encode(raw)
        return replace(sample, id=mixture.id(member, position), source=member)


def _named(sequence: dict) -> str:
    keys = ("data.source", "data.sources")
    return next(f"{key.removeprefix('data.')} {sequence[key]}" for key in keys if key in sequence)


class RowIterator:
    """The rows of one worker, with the state of its shards."""

    def __init__(self, rows: PackedRows, turn: int, turns: int):
        self.rows = rows
        self.next_index = rows.consumed + rows.rank + rows.ranks * turn
        self.stride = rows.ranks * turns
        self.shards = {}
        self.states = {}
        for number in range(self.next_index % self.stride, rows.virtual_shards, self.stride):
            shard = Shard(
                number,
                rows.virtual_shards,
                rows.mixture,
                rows.fetch,
                rows.seq_len,
                rows.window,
                rows.overlong,
            )
            self.shards[number] = shard
            if number in rows.initial:
                self.states[number] = rows.initial[number]

    def __iter__(self) -> "RowIterator":
        return self

    def __next__(self) -> Row | DataError | ReadError:
        try:
            return self._next_row()
        except (DataError, ReadError) as error:
            return error  # for RowLoader to raise: a worker would wrap it in its own traceback

    def _next_row(self) -> Row:
        number = self.next_index % self.rows.virtual_shards
        self.next_index += self.stride
        shard = self.shards[number]
        before = shard.counts
        if number in self.states:
            before = saved_counts(self.states[number])
            if not any(counts.seen for counts in shard.counts):
                shard.load_state_dict(self.states[number])
        before = [replace(counts) for counts in before]
        samples = shard.next_row()
        row = make_row(
            samples,
            self.rows.seq_len,
            self.rows.encoder,
            lambda sample, error: shard.bad(sample.source, sample.id, f"{sample.origin}: {error}"),
        )
        shard.count_row(row.sources, row.doc_lens)
        row.ended = not samples
        row.counts_of = [now - then for now, then in zip(shard.counts, before, strict=True)]
        row.skipped, row.reasons = list(shard.skipped), shard.reasons[-MAX_REASONS:]
        shard.skipped.clear()
        shard.reasons.clear()
        self.states[number] = shard.state_dict()
        return row

    def state_dict(self) -> dict:
        return {SHARDS: dict(self.states)}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to do: `PackedRows.restore` is the one way back, for any number of workers."""


def saved_counts(shard: dict) -> list[Counts]:
    """By source, from the state of a shard."""
    return [Counts(*counts) for counts in shard["counts"]]


def total_counts(shards: dict[int, dict], sources: int) -> list[Counts]:
    """By source, of the states of shards together."""
    counts = [saved_counts(shard) for shard in shards.values()]
    return [sum((shard[k] for shard in counts), Counts()) for k in range(sources)]


def merge_states(states: list[dict]) -> dict:
    """The states of all ranks as one that any number of ranks can restore."""
    rows = {state["rows"] for state in states}
    assert len(rows) == 1, f"ranks stopped at different rows: {sorted(rows)}"
    merged = {}
    for state in states:
        merged |= state[SHARDS]
    return states[0] | {SHARDS: merged}


def find_shards(snapshot: object) -> dict[int, dict]:
    """The shards of all workers in a snapshot of torchdata's, wherever it keeps them."""
    if not isinstance(snapshot, dict):
        return {}
    if SHARDS in snapshot:
        return snapshot[SHARDS]
    found = {}
    for value in snapshot.values():
        found |= find_shards(value)
    return found


def check_shards(virtual_shards: int, ranks: int, num_workers: int) -> None:
    """Every shard must have one owner among ranks and workers."""
    owners = ranks * max(num_workers, 1)
    if virtual_shards % owners == 0:
        return
    below, above = virtual_shards // owners * owners, (virtual_shards // owners + 1) * owners
    nearest = f"{below} or {above}" if below else str(above)
    # The number of workers first: the shards of a run that is to be resumed cannot change.
    workers = [w for w in range(1, virtual_shards + 1) if virtual_shards % (ranks * w) == 0]
    best = min(workers, key=lambda w: abs(w - num_workers), default=None)
    instead = f"use data.num_workers = {best}, or " if best is not None else ""
    raise ConfigError(
        f"data.virtual_shards = {virtual_shards} is no multiple of {owners} ({ranks} data-parallel "
        f"rank(s) x {max(num_workers, 1)} worker(s)); {instead}for a new run "
        f"data.virtual_shards = {nearest}"
    )


def as_is(row: Row | DataError | ReadError) -> Row | DataError | ReadError:
    return row
