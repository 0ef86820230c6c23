"""Where each pair's row lies in the buffer that the experts compute on.

Rows are grouped by expert and every group starts at a multiple of `ALIGN` rows. Aligned groups
keep the number of distinct matrix shapes small (a CPU's matmul library compiles a bfloat16 kernel
for each new shape, about a millisecond each) and suit fp8 and mxfp8. A CPU's wider types know no
such kernels, and there every filler row costs more: `ALIGN_WIDE` rows, a cache line of weights.

Two layouts, E = 3 experts, ALIGN = 4, counts (5, 1, 4), `x` a pair's row, `.` a filler:

    ragged    xxxxx... x... xxxx          ends_E = [8, 12, 16]    groups as long as they must be
    uniform   xxxxx... x....... xxxx....  C = 8                   every group as long as the longest

The uniform layout is one batched matmul, the ragged one a loop over the experts. On a CPU with AMX
the loop costs each expert in bfloat16, whose matmuls are fast and repack the weights, as much time
as about 64 more rows would: uniform is chosen where it has fewer fillers than that. In wider types,
and without AMX, the loop costs next to nothing: uniform only where it needs no more. On other
devices the layout is always ragged: uniform needs the counts on the host, for which one would have
to wait.

A filler row copies row 0 of the tokens and has weight 0, which makes its output and every
gradient that flows through it exactly zero: no buffer needs to be cleared.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titan_vlm.models.moe.routing import Routing

ALIGN = 32
ALIGN_WIDE = 8
AMX = torch.cpu._is_amx_tile_supported()


@dataclass
class Layout:
    """R rows of pairs, grouped by expert.

    rows_P       row of each pair, in the order of the routing
    source_R     token that each row copies
    weights_R    weight of each row, 0 for fillers; carries the router's gradient
    ends_E       int32 end of each group, for a grouped matmul
    group        rows per expert if they are all equal (uniform), else None
    """

    rows_P: Tensor
    source_R: Tensor
    weights_R: Tensor
    ends_E: Tensor
    group: int | None


def make_layout(routing: Routing, dtype: torch.dtype, align: int | None = None) -> Layout:
    """Lay out the pairs of `routing` for its experts, which compute in `dtype`, groups at multiples
    of `align` rows (default: what suits the type and the device)."""
    experts, num_pairs = routing.expert_ids_P, routing.expert_ids_P.numel()
    wide_on_cpu = dtype != torch.bfloat16 and experts.device.type == "cpu"
    align = align or (ALIGN_WIDE if wide_on_cpu else ALIGN)
    counts_E = routing.counts_E
    padded_E = (counts_E + (align - 1)) // align * align
    group = _uniform_group(padded_E, num_pairs, dtype)
    if group is not None:
        padded_E = torch.full_like(counts_E, group)
    ends_E = padded_E.cumsum(0)

    order_P = experts.argsort(stable=True)
    # How far each group is shifted by the fillers of the groups before it.
    shift_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)
    sorted_rows_P = torch.arange(num_pairs, device=experts.device) + shift_E[experts[order_P]]
    rows_P = torch.empty_like(order_P).index_copy_(0, order_P, sorted_rows_P)

    num_rows = _num_rows(ends_E, num_pairs, group, align)
    source_R = rows_P.new_zeros(num_rows).index_copy_(0, rows_P, routing.token_ids_P)
    weights_R = routing.weights_P.new_zeros(num_rows).index_copy(0, rows_P, routing.weights_P)
    return Layout(rows_P, source_R, weights_R, ends_E.to(torch.int32), group)


def _uniform_group(padded_E: Tensor, num_pairs: int, dtype: torch.dtype) -> int | None:
    if padded_E.device.type != "cpu" or num_pairs == 0:
        return None
    longest = int(padded_E.max())
    waste = longest * len(padded_E) - int(padded_E.sum())
    # The loop passes over experts without rows: with few tokens it is far ahead.
    return longest if waste <= spare_rows(dtype) * int(padded_E.count_nonzero()) else None


def spare_rows(dtype: torch.dtype) -> int:
    """Rows that the uniform layout may have more than the ragged one, per expert in use."""
    return 64 if dtype == torch.bfloat16 and AMX else 0


def _num_rows(ends_E: Tensor, num_pairs: int, group: int | None, align: int) -> int:
    """R; on a device an upper bound that the host knows, rows past the last group being unused."""
    num_experts = len(ends_E)
    if group is not None:
        return group * num_experts
    if ends_E.device.type == "cpu":
        return int(ends_E[-1])
    bound = num_pairs + min(num_experts, num_pairs) * (align - 1)
    return (bound + align - 1) // align * align
