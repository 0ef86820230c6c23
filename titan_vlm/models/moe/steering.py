"""Balance without a loss: what a router changes itself, once after every step.

    bias         added to the scores that choose, not to the weights: by a fixed speed against the
                 load of the step (DeepSeek-V3), or to a quantile of the step's scores
    thresholds   a token goes to every expert whose threshold it passes
    averages     of expert choice: load and importance, for the user to see

All are functions of sums over the tokens of a step. A step adds up `pending` on every rank, then it
is summed over ranks and `update` is called: the buffers are the same everywhere, are saved with the
weights, and recomputation adds nothing twice.

`V` tokens, `E` experts, `Q` bins of a histogram.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from titan_vlm.models.moe import selection
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.routing import count

if TYPE_CHECKING:
    from titan_vlm.models.moe.router import Chosen

BINS = 1000


class Steering(nn.Module):
    """What all kinds share. `size`: numbers to be summed over a step."""

    def __init__(self, size: int, **buffers: Tensor):
        super().__init__()
        self.register_buffer("pending", torch.zeros(size, dtype=torch.float64), persistent=False)
        for name, value in buffers.items():
            self.register_buffer(name, value.double())

    def look(self, scores_VE: Tensor) -> None:
        """See the scores of a micro-batch, without bias."""

    def add(self, pairs_E: Tensor, chosen: "Chosen") -> None:
        """See the pairs it made."""

    def update(self, total: Tensor) -> None:
        """Act on `pending`, summed over ranks; the caller zeroes it."""
        raise NotImplementedError


def make_steering(config: MoEConfig, num_experts: int, top_k: int) -> Steering | None:
    """As the configuration says; None where nothing is steered."""
    if config.bias_update == "sign":
        return SignBias(num_experts, config.bias_speed, config.bias_centred)
    if config.bias_update == "quantile":
        return QuantileBias(num_experts, top_k, config.n_groups, config.topk_groups)
    if config.router == "threshold":
        return Thresholds(num_experts, top_k, config.ema_decay, config.score == "sigmoid")
    if config.router == "expert_choice":
        return Averages(num_experts, config.ema_decay)
    return None


class SignBias(Steering):
    """bias_e += speed * sign(mean load - load_e) (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437).

    Loads are the pairs that were really made in the step, bias included, before drops.
    """

    def __init__(self, num_experts: int, speed: float, centred: bool):
        super().__init__(num_experts, bias_E=torch.zeros(num_experts))
        self.speed, self.centred = speed, centred

    def add(self, pairs_E: Tensor, chosen: "Chosen") -> None:
        self.pending += pairs_E

    def update(self, total: Tensor) -> None:
        change_E = self.speed * (total.mean() - total).sign()
        bias_E = self.bias_E + change_E
        self.bias_E.copy_(bias_E - bias_E.mean() if self.centred else bias_E)


class QuantileBias(Steering):
    """The bias with which each expert would have had its even share of the step before.

    With a_v the (K+1)-th best biased score of token v, expert e gets v when its score plus bias is
    above: the bias that v asks of it is a_v - s_ve, and its K/E-quantile over the tokens lets in
    their K/E-th part. Quantiles come from a histogram of what v asks beyond the bias that e has,
    linear inside a bin: sums of whole numbers, the same on every mesh. It lies within +-(1 + max
    bias - min bias); bins are even in its cube root, so that they are the finer the less there is
    to change: scores of a softmax over hundreds of experts differ by thousandths.
    (Quantile balancing of Megatron-Core and of the Kimi K3 report, appendix D.)

    With groups a_v is the (K+1)-th best of the experts in v's best groups, and what v asks beyond
    e's bias is at least what would take e's group among them, were it added to the group's experts
    all alike (`shift_to_enter`): they move together. If each asked for what would do alone, groups
    would change places for ever; if for none of it, a group that is seldom chosen would stay so.
    """

    LOW, WIDTH = -1.0, 2.0 / BINS

    def __init__(self, num_experts: int, top_k: int, n_groups: int = 1, topk_groups: int = 1):
        super().__init__(num_experts * BINS, bias_E=torch.zeros(num_experts))
        self.share, self.groups = top_k / num_experts, (n_groups, topk_groups)
        self.next = min(top_k + 1, num_experts // n_groups * topk_groups)

    def look(self, scores_VE: Tensor) -> None:
        by_VE = scores_VE + self.bias_E.to(scores_VE.dtype)
        inside_VE = selection.best_groups(by_VE, *self.groups) if self.groups[0] > 1 else by_VE
        next_V1 = inside_VE.topk(self.next, dim=-1).values[:, -1:]
        asked_VE = next_V1 - by_VE
        if self.groups[0] > 1:
            asked_VE = asked_VE.maximum(selection.shift_to_enter(by_VE, *self.groups))
        asked_VE = asked_VE.double() / self._most()
        self.pending += histogram(asked_VE.sign() * asked_VE.abs() ** (1 / 3), self.LOW, self.WIDTH)

    def _most(self) -> Tensor:
        return 1 + self.bias_E.max() - self.bias_E.min()

    def update(self, total: Tensor) -> None:
        place_E = quantile(total.view(-1, BINS), self.share, self.LOW, self.WIDTH)
        bias_E = self.bias_E + self._most() * place_E**3
        found = total.sum() > 0  # a step without any token says nothing
        self.bias_E.copy_(torch.where(found, bias_E - bias_E.mean(), self.bias_E))


class Thresholds(Steering):
    """A token goes to every expert whose threshold its score passes (arXiv 2603.11535).

    A threshold is the moving average over steps of the score that K/E of the step's tokens pass, so
    that a token has K experts on average. Before the first step there are none, and tokens choose
    their top-k.

    A score's place is its logarithm (softmax) or its logit (sigmoid), from -20 to 20: scores may
    differ by orders of magnitude. Histograms are over how far that is from the threshold's place,
    at first from that of even scores; bins are even in the distance's cube root, so that they are
    the finer the closer they are: scores of a gate that hardly prefers differ by thousandths.
    """

    LOW, WIDTH, MOST = -1.0, 2.0 / BINS, 40.0

    def __init__(self, num_experts: int, top_k: int, decay: float, sigmoid: bool):
        super().__init__(
            num_experts * BINS, threshold_E=torch.zeros(num_experts), steps=torch.zeros(())
        )
        self.share, self.decay, self.sigmoid = top_k / num_experts, decay, sigmoid

    def above(self, scores_VE: Tensor, top_k: int) -> Tensor:
        """[V, E] pairs."""
        first = torch.zeros_like(scores_VE, dtype=torch.bool)
        first = first.scatter_(1, scores_VE.topk(top_k, dim=-1).indices, True)
        return torch.where(self.steps > 0, scores_VE > self.threshold_E.to(scores_VE.dtype), first)

    def look(self, scores_VE: Tensor) -> None:
        away_VE = (self._place(scores_VE.double()) - self._middle()) / self.MOST
        self.pending += histogram(away_VE.sign() * away_VE.abs() ** (1 / 3), self.LOW, self.WIDTH)

    def _place(self, scores: Tensor) -> Tensor:
        return scores.logit() if self.sigmoid else scores.log()

    def _middle(self) -> Tensor:
        even = 0.5 if self.sigmoid else 1 / len(self.threshold_E)
        scores_E = torch.where(self.steps > 0, self.threshold_E, even)
        return self._place(scores_E).clamp(-self.MOST / 2, self.MOST / 2)

    def update(self, total: Tensor) -> None:
        away_E = quantile(total.view(-1, BINS), 1 - self.share, self.LOW, self.WIDTH)
        place_E = self._middle() + self.MOST * away_E**3
        new_E = place_E.sigmoid() if self.sigmoid else place_E.exp()
        keep = torch.where(self.steps > 0, self.decay, 0.0)
        new_E = keep * self.threshold_E + (1 - keep) * new_E
        found = total.sum() > 0
        self.threshold_E.copy_(torch.where(found, new_E, self.threshold_E))
        self.steps += found


class Averages(Steering):
    """Moving averages over steps of each expert's share of the pairs and of their weights."""

    def __init__(self, num_experts: int, decay: float):
        super().__init__(
            2 * num_experts,
            load_ema_E=torch.zeros(num_experts),
            importance_ema_E=torch.zeros(num_experts),
            steps=torch.zeros(()),
        )
        self.decay = decay

    def add(self, pairs_E: Tensor, chosen: "Chosen") -> None:
        importance_E = torch.zeros_like(pairs_E, dtype=torch.float64)
        importance_E.index_add_(0, chosen.experts_P, chosen.weights_P.detach().double())
        self.pending += torch.cat((pairs_E.double(), importance_E))

    def update(self, total: Tensor) -> None:
        keep = torch.where(self.steps > 0, self.decay, 0.0)
        found = total.sum() > 0
        for average_E, sum_E in zip(
            (self.load_ema_E, self.importance_ema_E), total.chunk(2), strict=True
        ):
            share_E = sum_E / sum_E.sum().clamp(min=1e-20)
            new_E = keep * average_E + (1 - keep) * share_E
            average_E.copy_(torch.where(found, new_E, average_E))
        self.steps += found


# ---------------------------------------------------------------------------- histograms


def histogram(values_VE: Tensor, low: Tensor | float, width: Tensor | float) -> Tensor:
    """[E * Q] how many of each column fall in each bin; what lies outside, in the outermost."""
    num_experts = values_VE.shape[1]
    bins_VE = ((values_VE.double() - low) / width).nan_to_num(0.0).floor().clamp(0, BINS - 1).long()
    columns_E = torch.arange(num_experts, device=values_VE.device) * BINS
    return count((bins_VE + columns_E).flatten(), num_experts * BINS).double()


def quantile(counts_EQ: Tensor, share: float, low: Tensor | float, width: Tensor | float) -> Tensor:
    """[E] values that a share of each row's counts lies below, linear within a bin."""
    ends_EQ = counts_EQ.cumsum(-1)
    target_E1 = share * ends_EQ[:, -1:]
    bin_E1 = (ends_EQ < target_E1).sum(-1, keepdim=True).clamp(max=BINS - 1)
    inside_E1 = counts_EQ.gather(1, bin_E1)
    before_E1 = ends_EQ.gather(1, bin_E1) - inside_E1
    place_E1 = bin_E1 + (target_E1 - before_E1) / inside_E1.clamp(min=1)
    return (low + width * place_E1).squeeze(1)
