"""What became of every source of a mixture: its loss in a step, its samples since the run began.

The loss is that of the training step itself, token by token where the head computes it, added up by
the source of each token's document; no token is computed twice. It is taken on steps that report.
"""

import logging
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from titan_vlm import distributed, events
from titan_vlm.data.loader import MAX_REASONS
from titan_vlm.data.mixture import Mixture
from titan_vlm.data.packing import Counts
from titan_vlm.errors import DataError
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
            if was.seen < member.end <= now.seen and member.name not in self.told:
                self.told.add(member.name)
                others = zip(self.members, self.counts, strict=True)
                goes_on = any(x.weight and counts.seen < x.end for x, counts in others)
                logger.info(
                    "step %d: source %s is read to its end (%s samples); %s",
                    *(step, member.name, member.extent),
                    "its share goes to the others" if goes_on else "none is left",
                )
                events.write("source_end", step=step, source=member.name)

    @property
    def total(self) -> Counts:
        """Of all sources."""
        return sum(self.counts, Counts())

    def check_bad(self, limit: float, reasons: Iterable[str]) -> None:
        """Judged on the sums over all ranks since the run began: so every rank ends it at the same
        step, on any mesh, and a resumed run where the uninterrupted one would.

        Args:
            limit: `data.max_bad_fraction`.
            reasons: why the last bad samples of this rank are.

        Raises:
            DataError: more are bad.
        """
        total = self.total
        if not total.too_many_bad(limit):
            return
        found: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(found, list(reasons))  # the bad may all be another rank's
        # Ranks that share their rows have the same reasons.
        named = list(dict.fromkeys(reason for rank in found for reason in rank))[:MAX_REASONS]
        raise DataError(
            f"{total.bad} of {total.seen} samples are bad, more than data.max_bad_fraction = "
            f"{limit} allows: {'; '.join(named) or 'the log of the run names them'}"
        )

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


def source_of_tokens(batch: Batch) -> Tensor:
    """int64 [B, S] on the host; 0 on padding, which has no target."""
    host = batch.on_host
    source_BS = torch.zeros(host.tokens_BS.shape, dtype=torch.int64)
    sources_N = torch.tensor(batch.sources, dtype=torch.int64)
    source_BS.view(-1)[host.tokens.index_V] = sources_N[host.tokens.sequence_V]
    return source_BS
