"""Bring every pair's token to its expert, and the outputs back.

    dispatch(x_TD, routing) -> x_RD, state         one row per pair, grouped by expert
    combine(y_RD, state, meanwhile) -> y_TD        sum over each token's pairs; `meanwhile` is run
                                                   while rows travel, and its result added

`LocalDispatcher` has all experts on this rank; `exchange.py` has those that talk to others. Both
directions are gathers both ways: nothing is added atomically, the result does not depend on a
thread schedule, and each is the other's adjoint.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_vlm.models.moe.layout import Layout, make_layout
from titan_vlm.models.moe.routing import Routing, count


@dataclass
class Rows:
    """Tokens copied to a row for each of their pairs, and the rows of a token summed.

    source_R     token that each row copies
    rows_P       row of each pair; the pairs are in the order of their tokens
    bags_T       where each token's pairs start
    """

    source_R: Tensor
    rows_P: Tensor
    bags_T: Tensor

    def spread(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [R, D]"""
        return _Spread.apply(x_TD, self)

    def collect(self, y_RD: Tensor) -> Tensor:
        """[R, D] -> [T, D]; zeros for a token in no pair."""
        return _Collect.apply(y_RD, self)


def make_rows(source_R: Tensor, rows_P: Tensor, token_ids_P: Tensor, num_tokens: int) -> Rows:
    """`Rows` of T = `num_tokens` tokens."""
    counts_T = count(token_ids_P, num_tokens)
    return Rows(source_R, rows_P, counts_T.cumsum(0) - counts_T)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x_TD.index_select(0, rows.source_R)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _sum_bags(grad_RD.contiguous(), ctx.rows), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return _sum_bags(y_RD, rows)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD.index_select(0, ctx.rows.source_R), None


def _sum_bags(y_RD: Tensor, rows: Rows) -> Tensor:
    # A bag per token: the fastest segmented sum of rows, in float32 inside.
    return F.embedding_bag(rows.rows_P, y_RD, rows.bags_T, mode="sum")


@dataclass
class LocalState:
    layout: Layout
    rows: Rows


class LocalDispatcher:
    """All experts on this rank; each one's rows begin at a multiple of `align` (None: as their
    type needs it)."""

    align: int | None = None

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, LocalState]:
        """Copy each pair's token to its row of its expert's group; `layout.py` has the order."""
        layout = make_layout(routing, x_TD.dtype, self.align)
        rows = make_rows(layout.source_R, layout.rows_P, routing.token_ids_P, x_TD.shape[0])
        return rows.spread(x_TD), LocalState(layout, rows)

    def combine(
        self, y_RD: Tensor, state: LocalState, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Sum the rows of each token's pairs: [T, D]. A token in no pair gets zeros."""
        y_TD = state.rows.collect(y_RD)
        return y_TD + meanwhile() if meanwhile else y_TD
