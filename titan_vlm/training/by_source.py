"""What became of every source of a mixture: its loss in a step, its samples since the run began.

The loss is that of the training step itself, token by token where the head computes it, added up by
the source of each token's document; no token is computed twice. It is taken on steps that report.
"""

import logging
import math

import torch
from torch import Tensor

from titan_vlm import distributed, events
from titan_vlm.data.mixture import Member, Mixture
from titan_vlm.data.packing import Counts
from titan_vlm.mesh import Mesh
from titan_vlm.models.inputs import Batch
from titan_vlm.training.loss import Tally

logger = logging.getLogger(__name__)


class BySource:
    """G sources. Nothing is done for fewer than two: the run's own figures say it all."""

    def __init__(self, mixture: Mixture, device: torch.device):
        self.names, self.members = mixture.names, mixture.members
        self.sums_2G = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
        self.counts = [Counts() for _ in self.names]  # of all ranks
        self.told: set[str] = set()  # those read to their end, once though steps may run again

    def set_counts(self, step: int, values: list[float]) -> None:
        """Those after `step`: `Counts.as_list` of one source after the other, summed over the
        ranks. Says which source is read to its end."""
        before = self.counts
        share = len(values) // len(self.names)
        self.counts = [
            Counts(*map(int, values[k * share : (k + 1) * share])) for k in range(len(self.names))
        ]
        for member, was, now in zip(self.members, before, self.counts, strict=True):
            if was.seen < end_of(member) <= now.seen and member.name not in self.told:
                self.told.add(member.name)
                others = zip(self.members, self.counts, strict=True)
                goes_on = any(counts.seen < end_of(other) for other, counts in others)
                logger.info(
                    "step %d: source %s is read to its end (%d x %d samples); %s",
                    *(step, member.name, member.epochs, len(member.source)),
                    "its share goes to the others" if goes_on else "none is left",
                )
                events.write("source_end", step=step, source=member.name)

    def tally(self, batch: Batch) -> Tally | None:
        """For the loss of a micro-batch, on the rank that computes it."""
        if len(self.names) < 2 or not batch.moment.observe:
            return None
        return Tally(source_of_tokens(batch).to(self.sums_2G.device), self.sums_2G)

    def figures(self, mesh: Mesh) -> dict[str, dict[str, float]]:
        """By name; a source without a target in this step has no loss. Every rank must call it.

        Sums 16 bytes for each source over the batch, and over the stages, of which the last has
        them.
        """
        if len(self.names) < 2:
            return {}
        summed = distributed.sum_over(mesh.pp, distributed.sum_over(mesh.batch, self.sums_2G))
        losses, targets = summed.tolist()
        self.sums_2G.zero_()
        found = {}
        for k, (name, counts) in enumerate(zip(self.names, self.counts, strict=True)):
            found[name] = {"loss": losses[k] / targets[k]} if targets[k] else {}
            found[name] |= {"samples": counts.samples, "tokens": counts.tokens, "bad": counts.bad}
        return found


def end_of(member: Member) -> float:
    """Samples until a source is read to its end."""
    return member.epochs * len(member.source) or math.inf


def source_of_tokens(batch: Batch) -> Tensor:
    """int64 [B, S] on the host; 0 on padding, which has no target."""
    host = batch.on_host
    source_BS = torch.zeros(host.tokens_BS.shape, dtype=torch.int64)
    sources_N = torch.tensor(batch.sources, dtype=torch.int64)
    source_BS.view(-1)[host.tokens.index_V] = sources_N[host.tokens.sequence_V]
    return source_BS
