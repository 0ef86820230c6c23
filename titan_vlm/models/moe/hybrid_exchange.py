"""The dispatcher that leaves the exchange and the sorting by expert to HybridEP.

It wants a map of tokens and experts, and what arrives is grouped by expert already, each group
filled up with zeros (`.`) to a multiple of `pad_multiple` (here 4). Two ranks, four experts, rank 0
(experts 0, 1) holds a b, rank 1 (experts 2, 3) holds c; `-` is a token that only fills up:

             map            arrived, by expert
    rank 0   a  1 1 0 0     rank 0:  a . . .  a c . .
             b  0 0 1 0
    rank 1   c  0 1 0 1     rank 1:  b . . .  c . . .
             -  0 0 0 0

All ranks must come with as many tokens: tokens that no expert gets make them equal.

The calls are those of `deep_ep.HybridEPBuffer` of DeepEP's branch hybrid-ep
(github.com/deepseek-ai/DeepEP/tree/hybrid-ep, deep_ep/hybrid_ep_buffer.py), with and without the
permutation fused into the exchange.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe import fused_library
from titan_vlm.models.moe.fused_library import FusedOptions
from titan_vlm.models.moe.layout import Layout
from titan_vlm.models.moe.routing import Routing
from titan_vlm.models.moe.timing import timed_exchange

# L tokens of each rank, fillers included; R rows that arrived here

# The routing maps are gathered in blocks of it.
TOKENS_MULTIPLE = 64


@dataclass
class HybridState:
    layout: Layout
    handle: tuple  # the library's, for the way back
    num_tokens: int  # of this rank


class HybridEPDispatcher:
    """A token travels once to each rank, and once between NVLink domains, with its weights.

    Two waits for the device per layer and direction-pair: the most tokens of a rank, and the
    library's for the numbers of rows.

    Args:
        buffer_class: what stands in for the library's; checks of hardware and dtype are left out.

    The others are those of `make_dispatcher`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        width: int,
        options: FusedOptions,
        buffer_class: type | None = None,
    ):
        num_sms = fused_library.choose_num_sms("hybridep", options)
        self.group, self.checked = group, buffer_class is None
        if buffer_class is None:
            buffer_class = fused_library.load("hybridep")
            fused_library.check_model("hybridep", width, group.size(), max_pairs=0)
        self.connection = fused_library.connect(
            options.share_buffer,
            HybridConnection,
            buffer_class,
            group,
            num_sms,
            options.pad_multiple,
            options.permute_fusion,
        )

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, HybridState]:
        """As `LocalDispatcher.dispatch`, for the experts of this rank and the tokens of all."""
        if self.checked:
            fused_library.check_tensor("hybridep", x_TD)
        num_tokens = x_TD.shape[0]
        longest = _longest(num_tokens, x_TD.device, self.group)
        place = (routing.token_ids_P, routing.expert_ids_P)
        map_LE = x_TD.new_zeros(longest, routing.num_experts, dtype=torch.bool)
        map_LE.index_put_(place, map_LE.new_ones(()))
        weights_LE = routing.weights_P.new_zeros(map_LE.shape).index_put(place, routing.weights_P)
        x_LD = F.pad(x_TD, (0, 0, 0, longest - num_tokens))
        # How much it sends only the device knows.
        x_RD, weights_R, padded_E, handle = timed_exchange(
            lambda x: _Dispatch.apply(x, weights_LE, map_LE, self.connection), x_LD, (0, 0)
        )
        # Every row that arrived is a token in one pair, at its place.
        rows_R = torch.arange(x_RD.shape[0], device=x_RD.device)
        ends_E = padded_E.to(x_RD.device, non_blocking=True).cumsum(0).to(torch.int32)
        layout = Layout(
            rows_P=rows_R, source_R=rows_R, weights_R=weights_R, ends_E=ends_E, group=None
        )
        return x_RD, HybridState(layout, handle, num_tokens)

    def combine(
        self, y_RD: Tensor, state: HybridState, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Bring the rows back and sum each token's: [T, D]."""
        y_LD = timed_exchange(
            lambda y: _Combine.apply(y, state.handle, self.connection), y_RD, (0, 0)
        )
        y_TD = y_LD[: state.num_tokens]
        return y_TD + meanwhile() if meanwhile else y_TD


def _longest(num_tokens: int, device: torch.device, group: dist.ProcessGroup) -> int:
    """The most tokens of a rank, at least one, filled up to a multiple."""
    most = torch.tensor(max(num_tokens, 1), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)  # 8 bytes
    return -(-int(most) // TOKENS_MULTIPLE) * TOKENS_MULTIPLE


class _Dispatch(torch.autograd.Function):
    """[L, D] and [L, E] -> [R, D] and [R], rows per local expert and the handle."""

    @staticmethod
    def forward(ctx, x_LD: Tensor, weights_LE: Tensor, map_LE: Tensor, connection):
        x_RD, weights_R, padded_E, handle = connection.dispatch(x_LD, weights_LE, map_LE)
        ctx.way = (handle, connection)
        ctx.mark_non_differentiable(padded_E)
        return x_RD, weights_R, padded_E, handle

    @staticmethod
    def backward(ctx, grad_RD: Tensor, grad_R: Tensor, *_):
        handle, connection = ctx.way
        grads = connection.combine(grad_RD.contiguous(), handle, grad_R.contiguous())
        return *grads, None, None


class _Combine(torch.autograd.Function):
    """[R, D] -> [L, D], the sum over each token's rows."""

    @staticmethod
    def forward(ctx, y_RD: Tensor, handle: tuple, connection: "HybridConnection") -> Tensor:
        ctx.way = (handle, connection, y_RD.shape[0])
        return connection.combine(y_RD.contiguous(), handle)[0]

    @staticmethod
    def backward(ctx, grad_LD: Tensor) -> tuple[Tensor, None, None]:
        handle, connection, rows = ctx.way
        return connection.dispatch_again(grad_LD.contiguous(), handle, rows), None, None


class HybridConnection:
    """The library's buffers, one per geometry (width and local experts), made at their first use.

    The library itself makes them longer when more tokens come.
    """

    def __init__(self, buffer_class: type, group, num_sms: int, pad_multiple: int, fuse: bool):
        self.buffer_class, self.group, self.num_sms = buffer_class, group, num_sms
        self.buffers: dict[tuple[int, int], object] = {}
        self.padding = {"pad_multiple": pad_multiple}
        # Not named where it is off: releases before the fusion do not know the argument.
        self.fuse_dispatch = {"fuse_permute_dispatch": True} if fuse else {}
        self.fuse_combine = {"fuse_unpermute_combine": True} if fuse else {}
        known = inspect.signature(buffer_class.dispatch_with_permute).parameters
        if fuse and "fuse_permute_dispatch" not in known:
            raise ConfigError(
                "permute_fusion = true: the installed deep_ep cannot fuse the permutation; "
                "install a newer hybrid-ep or leave the option out"
            )

    def dispatch(self, x_LD: Tensor, weights_LE: Tensor, map_LE: Tensor):
        """Rows and weights that arrive here, filled-up rows per local expert, handle."""
        experts_here = map_LE.shape[1] // self.group.size()
        buffer = self._buffer(x_LD, experts_here)
        x_RD, weights_R, _, padded_E, handle = buffer.dispatch_with_permute(
            hidden=x_LD,
            routing_map=map_LE,
            probs=weights_LE,
            num_of_experts_per_rank=experts_here,
            **self.padding,
            **self.fuse_dispatch,
        )
        return x_RD, weights_R, padded_E, (buffer, handle)

    def dispatch_again(self, x_LD: Tensor, handle: tuple, rows: int) -> Tensor:
        """Send other numbers the way of an earlier dispatch: [L, D] -> [R, D], R = `rows`."""
        buffer, inner = handle
        x_RD, *_ = buffer.dispatch_with_permute(
            hidden=x_LD,
            handle=inner,
            num_permuted_tokens=rows,
            **self.padding,
            **self.fuse_dispatch,
        )
        return x_RD

    def combine(self, y_RD: Tensor, handle: tuple, weights_R: Tensor | None = None):
        """Sums over each token's rows, [L, D] and, of `weights_R`, [L, E]."""
        buffer, inner = handle
        return buffer.combine_with_unpermute(
            hidden=y_RD, probs=weights_R, handle=inner, **self.padding, **self.fuse_combine
        )

    def _buffer(self, x_LD: Tensor, experts_here: int):
        geometry = (x_LD.shape[1], experts_here)
        if geometry not in self.buffers:
            self.buffers[geometry] = self.buffer_class(
                group=self.group,
                hidden_dim=x_LD.shape[1],
                max_num_of_tokens_per_rank=x_LD.shape[0],
                num_local_experts=experts_here,
                use_fp8=False,
                num_sms_dispatch_api=self.num_sms,
                num_sms_combine_api=self.num_sms,
            )
        return self.buffers[geometry]
