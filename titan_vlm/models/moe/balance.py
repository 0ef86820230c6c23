"""Losses that keep experts evenly loaded.

Each is a function of sums over tokens: how many pairs an expert has, its summed probability, and so
on. So a rank adds up its own tokens' (with gradients), learns the sums of all ranks, computes the
loss from those and from it the slope along each sum. The slope is then injected where the sum came
from: the routing weights pass through a function that hands it to the sum in the backward pass.
No loss travels anywhere, so that stages of a pipeline, recomputation and compiled blocks need
know nothing of it; and no collective has a gradient.

    tokens of this rank -> sums -> all-reduce -> loss -> slope
                            ^                              |
                            +------- backward pass --------+

`V` tokens, `E` experts, `K` chosen per token, `N` sequences, `P` pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from titan_vlm.models.moe.peers import Alone
from titan_vlm.models.moe.routing import count
from titan_vlm.models.moe.tokens import Tokens


def switch(prob_E: Tensor, count_E: Tensor, prob_tokens: Tensor, count_pairs: Tensor) -> Tensor:
    """E sum_e f_e P_e (Switch Transformer, Fedus et al. 2021, arXiv 2101.03961, equation 4).

    f_e is the share of pairs that expert e has, P_e its mean probability; 1 is perfect balance.
    transformers' `load_balancing_loss_func` is K times this: it divides pairs by tokens.
    """
    share_E = count_E / count_pairs.clamp(min=1)
    mean_E = prob_E / prob_tokens.clamp(min=1)
    return prob_E.shape[-1] * (share_E * mean_E).sum(-1)


def importance_load(importance_E: Tensor, pairs_E: Tensor) -> Tensor:
    """E sum_e I_e L_e: shares of the summed weights and of the pairs made; 1 is perfect balance."""
    importance_E = importance_E / importance_E.sum().clamp(min=_TINY)
    return importance_E.numel() * (importance_E * pairs_E / pairs_E.sum().clamp(min=1)).sum()


def squared_variation(x_E: Tensor) -> Tensor:
    """(standard deviation / mean)^2 over experts (Shazeer et al. 2017, arXiv 1701.06538)."""
    return x_E.var(unbiased=False) / x_E.mean().square().clamp(min=_TINY)


_TINY = 1e-20
_LEAST_STD = 1e-6


def smooth_load(clean_VE: Tensor, noisy_VE: Tensor, std_VE: Tensor, top_k: int) -> Tensor:
    """[E] summed probability that each token would choose expert e, were e's noise drawn again
    (Shazeer et al. 2017, appendix A, equations 8 to 10)."""
    if top_k >= clean_VE.shape[1]:
        return torch.ones_like(clean_VE).sum(0)
    best_VK = noisy_VE.topk(top_k + 1, dim=-1).values
    last_in, first_out = best_VK[:, -2:-1], best_VK[:, -1:]
    # What e must beat: the K-th best of the others.
    rival_VE = torch.where(noisy_VE >= last_in, first_out, last_in)
    # Dividing by what softplus makes of -50 has a gradient of 0 times infinity.
    return torch.special.ndtr((clean_VE - rival_VE) / std_VE.clamp(min=_LEAST_STD)).sum(0)


@dataclass
class Choice:
    """What the losses look at. Those of other losses than are asked for may be None.

    logits_VE      of the gate, without noise
    probs_VE       scores that sum to 1 for each token
    unbiased_VK    the K best by `probs_VE`: no bias, no groups, no noise
    token_P, experts_P, weights_P      the pairs made, before drops
    load_E         `smooth_load`
    """

    logits_VE: Tensor
    probs_VE: Tensor
    unbiased_VK: Tensor
    token_P: Tensor
    experts_P: Tensor
    weights_P: Tensor
    load_E: Tensor | None


@dataclass
class Slopes:
    """Of each loss that has a coefficient its value, over all ranks; and the slope along each of
    this rank's sums, coefficients and the number of micro-batches included."""

    values: dict[str, Tensor]
    slopes: list[Tensor]


def sums_of(choice: Choice, tokens: Tokens, losses: list[str]) -> dict[str, Tensor]:
    """This rank's sums, those with gradients: by name, of the losses asked for."""
    num_experts = choice.logits_VE.shape[1]
    sums = {}
    if "aux_loss" in losses:
        sums["prob_E"] = choice.probs_VE.sum(0)
    if "z_loss" in losses:
        sums["square"] = choice.logits_VE.logsumexp(-1).square().sum().unsqueeze(0)
    if "importance_loss" in losses or "cv_importance" in losses:
        zeros_E = choice.weights_P.new_zeros(num_experts)
        sums["importance_E"] = zeros_E.index_add(0, choice.experts_P, choice.weights_P)
    if "cv_load" in losses:
        sums["load_E"] = choice.load_E
    if "sequence_loss" in losses:
        zeros_NE = choice.probs_VE.new_zeros(tokens.num_sequences, num_experts)
        sums["prob_NE"] = zeros_NE.index_add(0, tokens.sequence_V, choice.probs_VE)
    return sums


def find_slopes(
    sums: dict[str, Tensor],
    choice: Choice,
    tokens: Tokens,
    coefficients: dict[str, float],
    seen_E: Tensor,
    batch_peers: Alone,
    sequence_peers: Alone,
) -> Slopes:
    """From this rank's sums, by one exchange with all that hold tokens of the micro-batch (and one
    with those that hold parts of its sequences), to losses and slopes.

    Args:
        seen_E: pairs of the un-biased choice in the micro-batches of this step so far, over all
            ranks; this one's are added in place.
        batch_peers: the ranks that hold other tokens of the global micro-batch.
        sequence_peers: those among them that hold other tokens of the same sequences.
    """
    num_experts, top_k = choice.logits_VE.shape[1], choice.unbiased_VK.shape[1]
    count_E = count(choice.unbiased_VK.flatten(), num_experts)
    pairs_E = count(choice.experts_P, num_experts)
    starts = (tokens.place_V == 0).sum()  # a sequence is counted where it begins
    num_tokens = torch.full_like(starts, len(tokens))

    batch_names = [name for name in sums if name != "prob_NE"]
    parts = [sums[name].detach().double() for name in batch_names]
    parts += [count_E.double(), pairs_E.double(), starts.double().view(1), num_tokens.view(1)]
    flat = batch_peers.sum(torch.cat([part.double() for part in parts]))
    *of_sums, count_E, pairs_E, sequences, all_tokens = flat.split([len(part) for part in parts])
    seen_E += count_E

    leaves = {
        name: total.to(sums[name].dtype).requires_grad_()
        for name, total in zip(batch_names, of_sums, strict=True)
    }
    if "prob_NE" in sums:
        leaves["prob_NE"] = sequence_peers.sum(sums["prob_NE"].detach()).requires_grad_()
    # What this small graph saves is its own: activation checkpointing must not take it for the
    # block's and, asked for it at once, run the block again.
    with torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
        values = {}
        if "aux_loss" in coefficients:
            values["aux_loss"] = switch(leaves["prob_E"], seen_E, all_tokens, seen_E.sum())
        if "z_loss" in coefficients:
            values["z_loss"] = leaves["square"].sum() / all_tokens.clamp(min=1).squeeze()
        if "importance_loss" in coefficients:
            values["importance_loss"] = importance_load(leaves["importance_E"], pairs_E)
        if "cv_importance" in coefficients:
            values["cv_importance"] = squared_variation(leaves["importance_E"])
        if "cv_load" in coefficients:
            values["cv_load"] = squared_variation(leaves["load_E"])
        if "sequence_loss" in coefficients:
            values["sequence_loss"] = _by_sequence(
                leaves["prob_NE"], choice, tokens, sequence_peers, top_k
            ) / sequences.clamp(min=1)
        total = sum(coefficients[name] * value.sum() for name, value in values.items())
        total = total / tokens.moment.micro_batches
        slopes = torch.autograd.grad(total, [leaves[name] for name in sums])
    shown = {name: value.detach().sum() for name, value in values.items()}
    if "sequence_loss" in shown:  # the others' sequences, too
        share = shown["sequence_loss"] / sequence_peers.size
        shown["sequence_loss"] = batch_peers.sum(share.clone())
    return Slopes(shown, [slope.detach() for slope in slopes])


def _itself(x: Tensor) -> Tensor:
    return x


def _by_sequence(
    prob_NE: Tensor, choice: Choice, tokens: Tokens, peers: Alone, top_k: int
) -> Tensor:
    """The Switch loss of each sequence, summed over this rank's sequences (DeepSeek-V3's
    complementary sequence-wise loss, arXiv 2412.19437, equations 17 to 20)."""
    num_experts = prob_NE.shape[1]
    cells = (tokens.sequence_V.unsqueeze(1) * num_experts + choice.unbiased_VK).flatten()
    count_NE = peers.sum(count(cells, prob_NE.numel())).view_as(prob_NE).double()
    pairs_N1 = count_NE.sum(-1, keepdim=True)
    return switch(prob_NE, count_NE, pairs_N1 / top_k, pairs_N1).sum()


def inject(x: Tensor, sums: list[Tensor], slopes: list[Tensor]) -> Tensor:
    """`x`; the backward pass through it adds `slopes` to the gradients of `sums`."""
    return _Inject.apply(x, len(sums), *sums, *slopes)


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, number: int, *sums_and_slopes: Tensor) -> Tensor:
        ctx.save_for_backward(*sums_and_slopes[number:])
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        slopes = ctx.saved_tensors
        return grad, None, *slopes, *(None for _ in slopes)
