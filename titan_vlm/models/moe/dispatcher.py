"""Bring every pair's token to its expert, and the outputs back.

    dispatch(x_TD, routing) -> x_RD, layout        one row per pair, grouped by expert
    combine(y_RD, layout, T) -> y_TD               sum over each token's pairs

Both are gathers in both directions: nothing is added atomically, the result does not depend on a
thread schedule, and each is the other's adjoint.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_vlm.models.moe.layout import Layout, make_layout
from titan_vlm.models.moe.routing import Routing


def dispatch(x_TD: Tensor, routing: Routing) -> tuple[Tensor, "DispatchState"]:
    """Copy each pair's token to its row of its expert's group (all experts on this rank).

    Returns:
        x_RD and the state that `combine` needs; see `layout.py` for the order of the rows.
    """
    layout = make_layout(routing)
    state = DispatchState(layout, _bag_starts(routing.token_ids_P, x_TD.shape[0]))
    return _Spread.apply(x_TD, state), state


def combine(y_RD: Tensor, state: "DispatchState") -> Tensor:
    """Sum the rows of each token's pairs: [T, D]. A token in no pair gets zeros."""
    return _Collect.apply(y_RD, state)


class DispatchState:
    """The way there, kept for the way back."""

    def __init__(self, layout: Layout, bags_T: Tensor):
        self.layout = layout
        self.bags_T = bags_T

    def spread(self, x_TD: Tensor) -> Tensor:
        return x_TD.index_select(0, self.layout.source_R)

    def collect(self, y_RD: Tensor) -> Tensor:
        # A bag per token: the fastest segmented sum of rows, in float32 inside.
        return F.embedding_bag(self.layout.rows_P, y_RD, self.bags_T, mode="sum")


def _bag_starts(token_ids_P: Tensor, num_tokens: int) -> Tensor:
    """Where each token's pairs start, pairs being in the order of the tokens."""
    counts_T = torch.bincount(token_ids_P, minlength=num_tokens)
    return counts_T.cumsum(0) - counts_T


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, state: DispatchState) -> Tensor:
        ctx.state = state
        return state.spread(x_TD)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.state.collect(grad_RD.contiguous()), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD: Tensor, state: DispatchState) -> Tensor:
        ctx.state = state
        return state.collect(y_RD)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.state.spread(grad_TD), None
