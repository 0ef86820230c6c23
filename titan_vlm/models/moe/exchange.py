"""Dispatchers between ranks: the experts of a layer are spread over a process group.

Rank r of n holds the experts r*E/n ... (r+1)*E/n - 1. Two ranks, E = 4, top-1, letters are tokens:

    rank 0 (experts 0, 1) holds a b c d, routed to 2 0 1 3
    rank 1 (experts 2, 3) holds e f g h, routed to 3 3 0 2

                     sort by expert        exchange             sort by expert
    rank 0  a b c d  -> [b c | a d]   ->   b c g (0 1 0)   ->   expert 0: b g   expert 1: c
    rank 1  e f g h  -> [g | h e f]   ->   a d h e f       ->   expert 2: a h   expert 3: d e f

What arrives is ordered by sender; from there it is a local dispatch of as many tokens as rows
arrived, each in one pair. The way back is the same in reverse, and so are both gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from titan_vlm import collectives
from titan_vlm.models.moe.dispatcher import LocalDispatcher, LocalState, Rows, make_rows
from titan_vlm.models.moe.layout import Layout
from titan_vlm.models.moe.routing import Routing
from titan_vlm.models.moe.timing import timed_exchange

# S rows sent by this rank, A rows that arrived here


@dataclass
class ExchangeState:
    local: LocalState
    sent: list[int]  # rows for each rank
    arrived: list[int]  # rows from each rank
    rows: Rows  # among those sent

    @property
    def layout(self) -> Layout:
        return self.local.layout


class AllToAllDispatcher:
    """Each pair's token travels to the rank of its expert: P x D numbers out, as many back.

    One wait for the device per layer and direction-pair: the numbers of rows, which the host needs.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.local = LocalDispatcher()

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, ExchangeState]:
        """As `LocalDispatcher.dispatch`, for the experts of this rank and the tokens of all."""
        ranks = self.group.size()
        experts_here = routing.num_experts // ranks
        order_P = routing.expert_ids_P.argsort(stable=True)
        rows_P = torch.empty_like(order_P)
        rows_P[order_P] = torch.arange(len(order_P), device=order_P.device)

        # Who sends how many rows for which expert: E numbers from each rank to all others.
        counts_rE = routing.counts_E.view(ranks, experts_here)
        even = [experts_here] * ranks
        counts_re = self._exchange(counts_rE.flatten(), even, even).view(ranks, experts_here)
        sent, arrived = torch.stack((counts_rE.sum(1), counts_re.sum(1))).tolist()

        tokens_P = routing.token_ids_P
        rows = make_rows(tokens_P[order_P], rows_P, tokens_P, x_TD.shape[0])
        x_AD = self._exchange(rows.spread(x_TD), sent, arrived)
        weights_S = routing.weights_P[order_P]
        weights_A = self._exchange(weights_S, sent, arrived)
        local_experts = torch.arange(experts_here, device=x_TD.device).repeat(ranks)
        here = Routing(
            token_ids_P=torch.arange(sum(arrived), device=x_TD.device),
            expert_ids_P=local_experts.repeat_interleave(
                counts_re.flatten(), output_size=sum(arrived)
            ),
            weights_P=weights_A,
            num_experts=experts_here,
        )
        x_RD, local = self.local.dispatch(x_AD, here)
        return x_RD, ExchangeState(local, sent, arrived, rows)

    def combine(
        self, y_RD: Tensor, state: ExchangeState, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Bring the rows back and sum each token's: [T, D]."""
        y_AD = self.local.combine(y_RD, state.local)
        if meanwhile is None:
            y_SD = self._exchange(y_AD, state.arrived, state.sent)
            return state.rows.collect(y_SD)
        journey = _Journey(state.arrived, state.sent, self.group)
        there, back = _bytes(y_AD, state.arrived, state.sent, self.group)
        y_SD = timed_exchange(lambda y: _Leave.apply(y, journey), y_AD, (there, None))
        other_TD = meanwhile()
        y_SD = timed_exchange(lambda y: _Arrive.apply(y, journey), y_SD, (None, back))
        return state.rows.collect(y_SD) + other_TD

    def _exchange(self, x: Tensor, sent: list[int], arrived: list[int]) -> Tensor:
        return timed_exchange(
            lambda x: _AllToAll.apply(x, sent, arrived, self.group),
            x,
            _bytes(x, sent, arrived, self.group),
        )


def _bytes(x: Tensor, sent: list[int], arrived: list[int], group) -> tuple[int, int]:
    """That leave this rank when `sent` rows of `x` go, and when the gradients come back."""
    row, me = x.shape[1:].numel() * x.element_size(), group.rank()
    return row * (sum(sent) - sent[me]), row * (sum(arrived) - arrived[me])


class _AllToAll(torch.autograd.Function):
    """Rows to and from every rank of the group; backward sends the gradients the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], arrived: list[int], group) -> Tensor:
        ctx.way = (arrived, sent, group)
        return _exchange(x, sent, arrived, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, *ctx.way), None, None, None


class _Journey:
    """An exchange under way: between `_Leave` and `_Arrive` the ranks compute something else. In
    the backward pass the gradients leave at `_Arrive`; autograd runs what was computed in between
    before it comes to `_Leave`, which waits for them."""

    def __init__(self, sent: list[int], arrived: list[int], group: dist.ProcessGroup):
        self.sent, self.arrived, self.group = sent, arrived, group

    def begin(self, x: Tensor, sent: list[int], arrived: list[int]) -> Tensor:
        self.out = x.new_empty(sum(arrived), *x.shape[1:])
        self.kept = x.contiguous()  # it is read until the exchange is over
        self.work = dist.all_to_all_single(
            self.out, self.kept, arrived, sent, group=self.group, async_op=True
        )
        return self.out

    def end(self) -> Tensor:
        self.work.wait()
        out, self.out, self.kept, self.work = self.out, None, None, None
        return out


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.begin(x, journey.sent, journey.arrived)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.end(), None  # `grad` only kept the order


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.end()
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        journey = ctx.journey
        journey.begin(grad, journey.arrived, journey.sent)
        return grad, None


def _exchange(x: Tensor, sent: list[int], arrived: list[int], group) -> Tensor:
    out = x.new_empty(sum(arrived), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), arrived, sent, group=group)
    return out


# ---------------------------------------------------------------------------- the reference


@dataclass
class GatherState:
    local: LocalState
    num_tokens: int  # of this rank
    longest: int  # tokens that every rank's part is padded to

    @property
    def layout(self) -> Layout:
        return self.local.layout


class AllGatherDispatcher:
    """Every rank sees every token and serves its own experts: n x T x D numbers each way.

    Works wherever all-gather does; `AllToAllDispatcher` is checked against it.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.local = LocalDispatcher()

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, GatherState]:
        ranks, rank = self.group.size(), self.group.rank()
        experts_here = routing.num_experts // ranks
        num_tokens, num_pairs = x_TD.shape[0], routing.token_ids_P.numel()
        most = torch.tensor([num_tokens, num_pairs], device=x_TD.device)
        longest, most_pairs = timed_exchange(self._most, most, (most.nbytes, None)).tolist()

        x_GD = self._gather(_pad(x_TD, longest))
        weights = self._gather(_pad(routing.weights_P, most_pairs))
        tokens = self._gather(_pad(routing.token_ids_P + rank * longest, most_pairs))
        # Padding belongs to no expert.
        experts = self._gather(_pad(routing.expert_ids_P, most_pairs, fill=-1))
        first = rank * experts_here
        mine = ((experts >= first) & (experts < first + experts_here)).nonzero().squeeze(-1)
        here = Routing(tokens[mine], experts[mine] - first, weights[mine], experts_here)
        x_RD, local = self.local.dispatch(x_GD, here)
        return x_RD, GatherState(local, num_tokens, longest)

    def combine(
        self, y_RD: Tensor, state: GatherState, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        y_GD = self.local.combine(y_RD, state.local)
        others = y_GD.nbytes // self.group.size() * (self.group.size() - 1)
        y_TD = timed_exchange(
            lambda y: collectives.reduce_scatter(y, 0, self.group), y_GD, (others, others)
        )[: state.num_tokens]
        return y_TD + meanwhile() if meanwhile else y_TD

    def _most(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def _gather(self, x: Tensor) -> Tensor:
        others = x.nbytes * (self.group.size() - 1)
        return timed_exchange(
            lambda x: collectives.gather_partial(x, 0, self.group), x, (others, others)
        )


def _pad(x: Tensor, length: int, fill: float = 0) -> Tensor:
    padding = x.new_full((length - x.shape[0], *x.shape[1:]), fill)
    return torch.cat((x, padding))
