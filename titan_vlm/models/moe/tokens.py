"""What a layer is told of its tokens besides their hidden states.

Two rows of six tokens, three documents, `.` padding:

    a a b b b .      index_V     0 1 2 3 4 | 6 7 8 9        places in the flattened [T]
    c c c c . .      sequence_V  0 0 1 1 1 | 2 2 2 2        which document (in a tower: picture)
                     place_V     0 1 0 1 2 | 0 1 2 3        where in it
                     keys_N      what names each document, whatever rows and rank it is in

With tensor parallelism a rank has some of the tokens; sequences keep their numbers, so that sums by
sequence can be added over ranks.
"""

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """Where in the run a micro-batch stands.

    micro_batch     its index within the step, of micro_batches
    observe         whether figures that only metrics want are to be taken
    """

    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    micro_batches: int = 1
    observe: bool = True


@dataclass(eq=False)
class Tokens:
    """The V tokens of a micro-batch that are no padding, in N sequences."""

    index_V: Tensor
    sequence_V: Tensor
    place_V: Tensor
    keys_N: Tensor
    moment: Moment = field(default_factory=Moment)
    # What a layer found out about these tokens. When activation checkpointing runs it again, it
    # looks here: nothing is exchanged twice, and slopes and drops stay what they were. So a layer
    # sees them once between a forward pass and its backward pass.
    memo: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return self.index_V.numel()

    @property
    def num_sequences(self) -> int:
        return self.keys_N.numel()

    def to(self, device: torch.device | str) -> "Tokens":
        """The same tokens, their tensors on `device`."""
        tensors = (self.index_V, self.sequence_V, self.place_V, self.keys_N)
        return Tokens(*(x.to(device, non_blocking=True) for x in tensors), self.moment)

    def once(self, key: Hashable, find: Callable[[], Tensor]) -> Tensor:
        """`find()`; in a recomputation what it returned in the forward pass. All ranks run again
        together, so that all of them call it or none."""
        if not runs_again() or key not in self.memo:
            self.memo[key] = find()
        return self.memo[key]

    def take(self, chosen: Tensor, index_V: Tensor) -> "Tokens":
        """Some of them, at other places."""
        return Tokens(
            index_V, self.sequence_V[chosen], self.place_V[chosen], self.keys_N, self.moment
        )

    def part(self, num_tokens: int, ranks: int, rank: int) -> "Tokens":
        """Those of one rank, where each has as many of the layer's T = `num_tokens`, padded to a
        multiple of the ranks. Waits for the device once for each set of tokens."""
        key = ("part", ranks, rank)
        if key not in self.memo:
            share = -(-num_tokens // ranks)
            index_V = self.index_V - rank * share
            mine = ((index_V >= 0) & (index_V < share)).nonzero().squeeze(-1)
            self.memo[key] = self.take(mine, index_V[mine])
        return self.memo[key]


def tokens_of(
    lens: list[int],
    keys: list[int] | None = None,
    valid_T: Tensor | None = None,
    moment: Moment | None = None,
) -> Tokens:
    """On the host, tokens that lie behind one another in sequences of `lens`.

    Args:
        keys: of each sequence that holds a token; None: their numbers.
        valid_T: False on padding, which has sequences of its own.
    """
    lens_N = torch.tensor(lens, dtype=torch.int64)
    ends_N = lens_N.cumsum(0)
    total = int(ends_N[-1]) if lens else 0
    sequence_T = torch.arange(len(lens)).repeat_interleave(lens_N)
    place_T = torch.arange(total) - (ends_N - lens_N)[sequence_T]
    if valid_T is None:
        index_V = torch.arange(total)
    else:
        index_V = valid_T.nonzero().squeeze(-1)
        filled_N = torch.zeros(len(lens), dtype=torch.bool).index_fill(0, sequence_T[index_V], True)
        sequence_T = (filled_N.cumsum(0) - 1)[sequence_T]
        lens_N = lens_N[filled_N]
    keys_N = torch.arange(len(lens_N)) if keys is None else torch.tensor(keys, dtype=torch.int64)
    return Tokens(index_V, sequence_T[index_V], place_T[index_V], keys_N, moment or Moment())


def runs_again() -> bool:
    """Whether activation checkpointing runs the forward pass again, inside the backward pass: what
    is counted then is counted already. (The test is torch.utils.checkpoint's own.)"""
    return torch._C._current_graph_task_id() != -1


def name_key(name: str) -> int:
    """A number of 63 bits for a name, the same in every process."""
    data = name.encode(errors="surrogatepass")  # JSON and file names may hold half a character
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
