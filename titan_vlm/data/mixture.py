"""Which source the next sample of a virtual shard comes from.

Every source has its own endless epoch order, dealt to the V shards alike: shard v owns the
positions v, v + V, v + 2V, ... of each. So a sample is seen once per epoch of its source, however
the shards choose. One source is a mixture of one, and always chosen.

A shard chooses by credit. A sample of `amount` (1, or its tokens) adds its share of that amount to
every source and takes the whole from the source it came from; the source with most credit is next:

    shares 3/4, 1/4     credit a    0  -1/4  -1/2   1/4    0       next, with what it will get:
                        credit b    0   1/4   1/2  -1/4    0       the larger of credit + share
                        takes       a     a     b     a    a ...   (of equals the first)

Credits stay within a few amounts of 0, so that the shares hold over any stretch; they remember no
more than the present gap, so that new weights, or the end of a source, only turn the course from
then on. Were all shards in step, all would come to a rare source at once: so each begins with the
credits of another place of the round.

Which samples are taken hence depends on the weights and on the shard alone, not on ranks.
"""

import logging
import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from titan_vlm.data.config import Data, Samples
from titan_vlm.data.sources import build_source
from titan_vlm.errors import ConfigError, DataEnded, DataError

logger = logging.getLogger(__name__)

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples, mod 1, are spread evenly and in no rhythm
MAX_ROUND = 4096  # samples; shards that come to a source as rarely as that never crowd


@dataclass
class Member:
    """One source of a mixture.

    source   its samples: `len(source)`, and `source[i]` for any i >= 0 (data/sources)
    weight   its share, relative to the other members'; 0: it is off
    epochs   times it is read; 0: for ever
    limit    samples that are read of it at most, in all epochs; 0: no limit
    path     where it lies, for messages
    """

    name: str
    source: Any
    weight: float = 1.0
    epochs: int = 0
    path: str = ""
    limit: int = 0

    @property
    def end(self) -> float:
        """Samples until it is read to its end."""
        return min(self.epochs * len(self.source) or math.inf, self.limit or math.inf)

    @property
    def extent(self) -> str:
        """That number, as a message says it."""
        epochs = f"{self.epochs} x {len(self.source)}"
        return epochs if self.end == self.epochs * len(self.source) else str(self.limit)


class Mixture:
    """Members and their epoch orders.

    Args:
        by: what weights are shares of, "samples" or "tokens"; "" for the one source of `[data]`.
    """

    def __init__(self, members: list[Member], seed: int = 0, by: str = ""):
        self.members, self.seed, self.by = members, seed, by
        self.orders = [EpochOrder(len(m.source), seed, k) for k, m in enumerate(members)]

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.members]

    def place(self, member: int, position: int) -> tuple[int, int]:
        """(epoch, number of the sample) of a position in the order of a member."""
        return divmod(self.orders[member][position], self.orders[member].size)

    def id(self, member: int, position: int) -> str:
        """Names a sample in one epoch of its source, the same in every run of these data."""
        epoch, number = self.place(member, position)
        return f"{self.members[member].name}:{epoch}:{number}"

    def end(self, member: int) -> float:
        """The position behind the last that is read of a member."""
        return self.members[member].end

    def ended(self, step: int) -> DataEnded:
        """The error of a run that has read all, in its first `step` steps."""
        on = [member for member in self.members if member.weight]
        read = ", ".join(f"{member.name} {member.extent}" for member in on)
        return DataEnded(
            f"after step {step} every source is through its epochs ({read} samples); raise "
            f"data.sources[0].epochs (or limit) or another's and start again, which goes on from "
            f"here, or end the run (or its stage) there: training.steps = {step}"
        )

    # ------------------------------------------------------------------------ resuming

    def sequence(self) -> dict:
        """What the orders depend on, under the names that a message gives it."""
        sizes = [order.size for order in self.orders]
        if not self.by:
            return {"data.source": self.names[0], "number of samples in data.path": sizes[0]}
        numbers = {f"number of samples in data.sources[{k}].path": n for k, n in enumerate(sizes)}
        return {"data.sources": ", ".join(self.names), "data.mixture_by": self.by} | numbers

    def paths(self) -> list[str]:
        return [member.path for member in self.members]

    def note_moves(self, before: list[str]) -> None:
        """Data may move between two parts of a run, but their number must stay; say so."""
        for member, path in zip(self.members, before, strict=True):
            if member.path != path:
                logger.warning(
                    "the run began with %s at %s; %s is taken for the same samples",
                    member.name,
                    path,
                    member.path,
                )


class EpochOrder:
    """Position j of the endless order of a source -> its index (epoch * size + number)."""

    def __init__(self, size: int, seed: int, member: int = 0):
        self.size, self.seed, self.member = size, seed, member
        self.permutations: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, slot = divmod(position, self.size)
        if epoch not in self.permutations:
            # Two are kept, for shards do not enter an epoch at the same time.
            newest = list(self.permutations.items())[-1:]
            self.permutations = dict([*newest, (epoch, self._permutation(epoch))])
        return epoch * self.size + int(self.permutations[epoch][slot])

    def _permutation(self, epoch: int) -> np.ndarray:
        seed = [self.seed, epoch, self.member]
        return np.random.Generator(np.random.PCG64(seed)).permutation(self.size)


class Turns:
    """How far one virtual shard is in each member, and whose turn it is."""

    def __init__(self, mixture: Mixture, number: int, shards: int):
        self.mixture, self.shards = mixture, shards
        self.cursors = [number] * len(mixture.members)  # position of its next sample, by member
        self.credits = [0.0] * len(mixture.members)
        self.samples = 0  # so far, of all members; and their tokens, or also samples
        self.amount = 0
        shares = self.shares()
        rarest = max(min(shares.values(), default=1), 1 / MAX_ROUND)
        for _ in range(int(number * GOLDEN_RATIO % 1 / rarest)):
            self._pay(self._most_due(shares, 1), shares, 1)

    def next(self) -> tuple[int, int] | None:
        """(member, position) of the next sample; None where every member is at its end."""
        shares = self.shares()
        if not shares:
            return None
        usual = self.amount / self.samples if self.samples else 1.0
        chosen = self._most_due(shares, usual)
        position = self.cursors[chosen]
        self.cursors[chosen] += self.shards
        return chosen, position

    def take(self, member: int, tokens: int) -> None:
        """The sample can be used; one that cannot is nobody's turn, and the member goes on."""
        amount = tokens if self.mixture.by == "tokens" else 1
        if not self.samples:  # the credits of the start are in samples
            self.credits = [credit * amount for credit in self.credits]
        self._pay(member, self.shares(), amount)
        self.samples += 1
        self.amount += amount

    def _most_due(self, shares: dict[int, float], amount: float) -> int:
        return max(
            shares, key=lambda k: self.credits[k] + shares[k] * amount
        )  # the first of equals

    def _pay(self, member: int, shares: dict[int, float], amount: float) -> None:
        for k, share in shares.items():
            self.credits[k] += share * amount
        self.credits[member] -= amount

    def shares(self) -> dict[int, float]:
        """By member, of those that are on and not at their end."""
        members, cursors = self.mixture.members, enumerate(self.cursors)
        left = [k for k, at in cursors if at < self.mixture.end(k) and members[k].weight]
        total = sum(members[k].weight for k in left)
        return {k: members[k].weight / total for k in left}

    def state_dict(self) -> dict:
        return {
            "cursors": list(self.cursors),
            "credits": list(self.credits),
            "taken": [self.samples, self.amount],
        }

    def load_state_dict(self, state: dict) -> None:
        self.cursors, self.credits = list(state["cursors"]), list(state["credits"])
        self.samples, self.amount = state["taken"]


def build_mixture(data: Data, seed: int, opened: Mixture | None = None) -> Mixture:
    """The sources to train on, as `[data]` and its `[[data.sources]]` say.

    Args:
        opened: a mixture of the same sources, with other weights.

    Raises:
        ConfigError: a source cannot be opened; in the names of its own table.
        DataError: a source has no samples.
    """
    sources = [member.source for member in opened.members] if opened else []
    if not data.sources:
        source = sources[0] if opened else build_source(data, data.split, seed)
        check_not_empty(source, "data", data)
        return Mixture([Member(data.source, source, path=data.path)], seed)
    members = []
    for k, table in enumerate(data.sources):
        try:
            # Its own keys, and what [data] says of all, such as limits.
            own = {field.name: getattr(table, field.name) for field in fields(Samples)}
            source = sources[k] if opened else build_source(replace(data, **own), table.split, seed)
        except ConfigError as error:
            where = rf"data.sources[{k}].\1"
            raise ConfigError(re.sub(r"^data\.(\w+)", where, str(error))) from error
        check_not_empty(source, f"data.sources[{k}]", table)
        weight = table.weight or len(source) ** (1 / data.mixture_temperature)
        weight = 0.0 if table.off else weight
        members.append(Member(table.name, source, weight, table.epochs, table.path, table.limit))
    mixture = Mixture(members, seed, data.mixture_by)
    total = sum(member.weight for member in members)
    for member in members:
        share, size = member.weight / total, len(member.source)
        until = "" if member.end == math.inf else f" until {member.extent} samples are read"
        logger.info(
            "source %s: %d samples, %.1f %% of %s%s",
            *(member.name, size, 100 * share, mixture.by, until),
        )
    return mixture


def check_not_empty(source: Any, table: str, samples: Data | Samples) -> None:
    if len(source) == 0:
        where = f'path = "{samples.path}"' if samples.path else f'split = "{samples.split}"'
        raise DataError(f"{table}.{where}: no samples in it")
