"""Dispatchers that leave the exchange to DeepEP or UCCL-EP (`hybrid_exchange.py`: to HybridEP).

Their kernels send a token once to each rank, however many of its experts are there, and write it
right into the other GPU's memory. They want a table of a token's experts instead of pairs. Two
ranks, four experts, K = 2, rank 0 (experts 0, 1) holds a b, rank 1 (experts 2, 3) holds c:

             pairs              table       arrived (local experts)    pairs of rank 0
    rank 0   a->0 a->1  b->2    a 0 1       rank 0:  a 0 1
                                b 2 -                c - 1             a->0 a->1  c->1
    rank 1   c->3 c->1          c 3 1       rank 1:  b 0 -
                                                     c 1 -             b->0  c->1

From there it is a local dispatch. On the way back each rank first sums a token's own experts, so
again one row per token and rank travels. The gradient of a dispatch is a combine, of a combine a
dispatch that finds its way with the handle of the first.

The calls are those of `deep_ep.Buffer` of DeepEP 1.1 to 1.2.1 (github.com/deepseek-ai/DeepEP,
deep_ep/buffer.py; in version 2 it is the legacy buffer) and of `uccl.ep.Buffer` of UCCL
(github.com/uccl-project/uccl, ep/python/uccl_ep/buffer.py), which has the same signatures.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe import fused_library
from titan_vlm.models.moe.dispatcher import LocalDispatcher, LocalState
from titan_vlm.models.moe.fused_library import FusedOptions
from titan_vlm.models.moe.hybrid_exchange import HybridEPDispatcher
from titan_vlm.models.moe.layout import Layout
from titan_vlm.models.moe.routing import Routing, count
from titan_vlm.models.moe.timing import timed_exchange

# K pairs of a token at most, A tokens that arrived here

BYTES = torch.bfloat16.itemsize


def make_dispatcher(
    name: str,
    group: dist.ProcessGroup,
    width: int,
    max_pairs: int,
    options: FusedOptions | None = None,
):
    """The dispatcher `name` of a layer: "deepep", "uccl_ep" or "hybridep".

    Args:
        group: the ranks that the experts are spread over.
        width: D of the layer.
        max_pairs: the most pairs of one token: K of a top-k router, else the number of experts.
        options: None: the defaults.

    Raises:
        ConfigError: the library, the hardware or the model does not fit; says what does.
    """
    options = options or FusedOptions()
    if name == "hybridep":
        return HybridEPDispatcher(group, width, options)
    return DeepEPDispatcher(name, group, width, max_pairs, options)


@dataclass
class FusedState:
    local: LocalState
    handle: tuple  # the library's, for the way back

    @property
    def layout(self) -> Layout:
        return self.local.layout


class DeepEPDispatcher:
    """A token travels once to each rank that has an expert of it, its weights in float32 with it.

    One wait for the device per layer and direction-pair: the library's, for the numbers of rows.

    Args:
        name: "deepep" or "uccl_ep".
        buffer_class: what stands in for the library's; checks of hardware and dtype are left out.

    The others are those of `make_dispatcher`.
    """

    def __init__(
        self,
        name: str,
        group: dist.ProcessGroup,
        width: int,
        max_pairs: int,
        options: FusedOptions,
        buffer_class: type | None = None,
    ):
        num_sms = fused_library.choose_num_sms(name, options)
        self.name, self.max_pairs, self.checked = name, max_pairs, buffer_class is None
        if buffer_class is None:
            buffer_class = fused_library.load(name)
            fused_library.check_model(name, width, group.size(), max_pairs)
        self.connection = fused_library.connect(
            options.share_buffer, Connection, buffer_class, group, num_sms, options.async_dispatch
        )
        self.connection.widen(width)
        self.local = LocalDispatcher()

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, FusedState]:
        """As `LocalDispatcher.dispatch`, for the experts of this rank and the tokens of all."""
        if self.checked:
            fused_library.check_tensor(self.name, x_TD)
        experts_TK, weights_TK = to_table(routing, x_TD.shape[0], self.max_pairs)
        # How much it sends only the device knows.
        x_AD, weights_AK, experts_AK, arrived, handle = timed_exchange(
            lambda x: _Dispatch.apply(
                x, weights_TK, experts_TK, routing.num_experts, self.connection
            ),
            x_TD,
            (0, 0),
        )
        here = from_table(experts_AK, weights_AK, arrived)
        x_RD, local = self.local.dispatch(x_AD, here)
        return x_RD, FusedState(local, handle)

    def combine(
        self, y_RD: Tensor, state: FusedState, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Bring the rows back and sum each token's: [T, D]."""
        y_AD = self.local.combine(y_RD, state.local)
        y_TD = timed_exchange(
            lambda y: _Combine.apply(y, state.handle, self.connection), y_AD, (0, 0)
        )
        return y_TD + meanwhile() if meanwhile else y_TD


def to_table(routing: Routing, num_tokens: int, max_pairs: int) -> tuple[Tensor, Tensor]:
    """Expert and weight of each token's pairs, [T, K]; -1 and 0 where it has fewer.

    No wait for the device. A token in more than `max_pairs` pairs is an IndexError on a CPU and
    the same assertion of the indexing kernel on a GPU.
    """
    tokens_P = routing.token_ids_P
    counts_T = count(tokens_P, num_tokens)
    starts_T = counts_T.cumsum(0) - counts_T
    column_P = torch.arange(len(tokens_P), device=tokens_P.device) - starts_T[tokens_P]
    place = (tokens_P, column_P)
    experts_TK = tokens_P.new_full((num_tokens, max_pairs), -1)
    experts_TK.index_put_(place, routing.expert_ids_P)
    weights_TK = routing.weights_P.new_zeros(num_tokens, max_pairs)
    return experts_TK, weights_TK.index_put(place, routing.weights_P)


def from_table(experts_AK: Tensor, weights_AK: Tensor, arrived: list[int]) -> Routing:
    """The pairs of a table, in the order of its tokens; `arrived` pairs per expert."""
    places_P = torch.nonzero_static((experts_AK >= 0).flatten(), size=sum(arrived)).squeeze(-1)
    return Routing(
        token_ids_P=places_P // experts_AK.shape[1],
        expert_ids_P=experts_AK.flatten().index_select(0, places_P),
        weights_P=weights_AK.flatten().index_select(0, places_P),
        num_experts=len(arrived),
    )


class _Dispatch(torch.autograd.Function):
    """[T, D] and [T, K] -> [A, D] and [A, K], local experts, pairs per expert and the handle."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, num_experts, connection):
        arrival = connection.dispatch(x_TD.contiguous(), experts_TK, weights_TK, num_experts)
        x_AD, experts_AK, weights_AK, arrived, handle = arrival
        ctx.way = (handle, connection)
        ctx.mark_non_differentiable(experts_AK)
        return x_AD, weights_AK, experts_AK, arrived, handle

    @staticmethod
    def backward(ctx, grad_AD: Tensor, grad_AK: Tensor, *_):
        handle, connection = ctx.way
        grads = connection.combine(grad_AD.contiguous(), handle, grad_AK.contiguous())
        return *grads, None, None, None


class _Combine(torch.autograd.Function):
    """[A, D] -> [T, D], the sum over the ranks."""

    @staticmethod
    def forward(ctx, y_AD: Tensor, handle: tuple, connection: "Connection") -> Tensor:
        ctx.way = (handle, connection)
        return connection.combine(y_AD.contiguous(), handle)[0]

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        handle, connection = ctx.way
        return connection.dispatch_again(grad_TD.contiguous(), handle), None, None


class Connection:
    """The library's buffer, for all layers that share it: made at the first use, for the widest.

    All layers say their width when they are built, so that no buffer is replaced in the middle of
    a step, where other ranks may still write to it.
    """

    def __init__(self, buffer_class: type, group: dist.ProcessGroup, num_sms: int, overlap: bool):
        self.buffer_class, self.group, self.overlap = buffer_class, group, overlap
        self.width, self._buffer = 0, None
        # A global of the library; the two configurations are what it is read into.
        buffer_class.set_num_sms(num_sms)
        try:
            self.dispatch_config = buffer_class.get_dispatch_config(group.size())
            self.combine_config = buffer_class.get_combine_config(group.size())
        except AssertionError as error:
            raise ConfigError(
                f"experts spread over {group.size()} ranks: {error}; "
                f'dispatcher = "all_to_all" takes any number'
            ) from error

    def widen(self, width: int) -> None:
        """Have room for tokens of `width` numbers."""
        if width > self.width:
            self.width, self._buffer = width, None

    @property
    def buffer(self):
        if self._buffer is None:
            ranks, row = self.group.size(), self.width * BYTES
            configs = (self.dispatch_config, self.combine_config)
            nvlink = max(config.get_nvl_buffer_size_hint(row, ranks) for config in configs)
            rdma = 0  # a library built for one node refuses the question
            if ranks > fused_library.NODE:
                rdma = max(config.get_rdma_buffer_size_hint(row, ranks) for config in configs)
            self._buffer = self.buffer_class(self.group, nvlink, rdma)
        return self._buffer

    def dispatch(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int):
        """Tokens, local experts and weights that arrive here, pairs per local expert, handle."""
        timing = self._timing()
        per_rank, per_node, per_expert, is_token_in_rank, ready = self.buffer.get_dispatch_layout(
            experts_TK, num_experts, **timing
        )
        if self.overlap:
            timing["previous_event"] = ready
        x_AD, experts_AK, weights_AK, arrived, handle, done = self.buffer.dispatch(
            x_TD,
            topk_idx=experts_TK,
            topk_weights=weights_TK,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            config=self.dispatch_config,
            **timing,
        )
        self._wait(done)
        return x_AD, experts_AK, weights_AK, arrived, handle

    def dispatch_again(self, x_TD: Tensor, handle: tuple) -> Tensor:
        """Send other numbers the way of an earlier dispatch: [T, D] -> [A, D]."""
        x_AD, _, _, _, _, done = self.buffer.dispatch(
            x_TD, handle=handle, config=self.dispatch_config, **self._timing()
        )
        self._wait(done)
        return x_AD

    def combine(self, y_AD: Tensor, handle: tuple, weights_AK: Tensor | None = None):
        """Sums over the ranks, [T, D] and, of `weights_AK`, [T, K]."""
        y_TD, weights_TK, done = self.buffer.combine(
            y_AD, handle, topk_weights=weights_AK, config=self.combine_config, **self._timing()
        )
        self._wait(done)
        return y_TD, weights_TK

    def _timing(self) -> dict:
        if not self.overlap:
            return {}
        # `capture`, not an event of our own: the two libraries make theirs differently.
        before = self.buffer_class.capture()
        return {"previous_event": before, "async_finish": True, "allocate_on_comm_stream": True}

    def _wait(self, done) -> None:
        if self.overlap:
            done.current_stream_wait()
