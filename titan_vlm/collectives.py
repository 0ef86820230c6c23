"""Collectives with gradients, for tensors of this rank over a process group.

    forward          backward         used where
    copy             all-reduce       a replicated tensor enters a computation that is split
    all-reduce       copy             the partial sums of a split computation become replicated
    all-gather       reduce-scatter   parts of a sequence become whole, the gradients are partial
    reduce-scatter   all-gather       partial sums become parts of a sequence
    slice            all-gather       a replicated tensor becomes parts
    all-gather       slice            and whole again, the gradients being replicated too

A tensor is replicated when all ranks hold the same, partial when its value is the sum over them.
Each function is a line of this table; a group of one rank or None is left alone by the callers.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def copy_to(x: Tensor, group: ProcessGroup) -> Tensor:
    """Replicated in, gradients partial."""
    return _CopyTo.apply(x, group)


def reduce_from(x: Tensor, group: ProcessGroup) -> Tensor:
    """Partial in, replicated out."""
    return _ReduceFrom.apply(x, group)


def gather_partial(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Parts along `dim` in, whole out; the gradients that come back are partial."""
    return _GatherPartial.apply(x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Partial in, the sum's part along `dim` out."""
    return _ReduceScatter.apply(x, dim, group)


def take_part(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Replicated in, this rank's part along `dim` out; ranks divide the dimension."""
    return _TakePart.apply(x, dim, group)


def join_parts(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Parts along `dim` in, replicated out; the gradients that come back are replicated."""
    return _JoinParts.apply(x, dim, group)


# ---------------------------------------------------------------------------- without gradients

# PyTorch 2.13 renamed them.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The parts of all ranks along `dim`, in the order of the ranks."""
    x = x.movedim(dim, 0).contiguous()
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _gather(out, x, group=group)
    return out.movedim(0, dim)


def sum_and_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part along `dim` of the sum over all ranks."""
    x = x.movedim(dim, 0).contiguous()
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    _scatter(out, x, group=group)
    return out.movedim(0, dim)


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over all ranks, a new tensor."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def part(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of `x` along `dim`."""
    return x.chunk(group.size(), dim)[group.rank()]


# ---------------------------------------------------------------------------- with


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherPartial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.way = (dim, group)
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_and_scatter(grad, *ctx.way), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.way = (dim, group)
        return sum_and_scatter(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, *ctx.way), None, None


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.way = (dim, group)
        return part(x, dim, group).contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, *ctx.way), None, None


class _JoinParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.way = (dim, group)
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return part(grad, *ctx.way).contiguous(), None, None
