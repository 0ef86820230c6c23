"""Asynchronous tensor parallelism: products that overlap with the exchange before or behind them.

With sequence parallelism a pair of products stands between an all-gather of the positions and a
reduce-scatter back to them. Both are cut into as many pieces as there are ranks, and while one
piece is multiplied the next one travels, over symmetric memory (Wang et al. 2023, ASPLOS,
"Overlap Communication with Dependent Computation via Decomposition"; PyTorch's
`torch.ops.symm_mem`). The backward pass is the same two with their parts exchanged.

    columns   all-gather, then products      backward: product, then reduce-scatter
    row       product, then reduce-scatter   backward: all-gather, then product

On a CPU the exchange and the products simply follow one another: the same numbers, no overlap.
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial

from titan_vlm import collectives

POSITIONS = 1  # the dimension of [B, S, D] that is gathered and scattered


def prepare(mesh: DeviceMesh) -> None:
    """Open symmetric memory between the ranks of `mesh`; nothing to do on a CPU."""
    if mesh.device_type == "cuda":
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        enable_symm_mem_for_group(mesh.get_group().group_name)


def pair(module: nn.Module, columns: list[nn.Linear], row: nn.Linear, group: ProcessGroup) -> None:
    """Let a module that begins with `columns` and ends in `row`, each split already, take and give
    parts of a sequence."""
    products: dict[nn.Linear, Tensor] = {}

    def column(linear: nn.Linear, x: Tensor) -> Tensor:
        out = products[linear].view(*x.shape[:-1], -1)
        return out if linear.bias is None else out + linear.bias.to_local()

    for linear in columns:
        linear.forward = lambda x, linear=linear: column(linear, x)
    # The product of the row is that of `leave`: until then its input passes.
    row.forward = lambda x: x
    forward = module.forward

    def run(x_BSD: Tensor, *args) -> Tensor:
        weights = [linear.weight.to_local() for linear in columns]
        whole_BSD, *outs = _Columns.apply(x_BSD, group, *weights)
        products.update(zip(columns, outs, strict=True))
        try:
            hidden = forward(whole_BSD, *args)
        finally:
            products.clear()
        out = _Row.apply(hidden, row.weight.to_local(), group)
        # Every rank adds it to its own positions.
        return out if row.bias is None else out + row.bias.to_local(grad_placements=[Partial()])

    module.forward = run


class _Columns(torch.autograd.Function):
    """x [B, S/n, D], weights [F, D] each -> x whole [B, S, D], and x @ weight^T of each."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup, *weights: Tensor):
        whole, outs = gather_and_multiply(x, [weight.t() for weight in weights], group)
        ctx.save_for_backward(whole, *weights)
        ctx.group = group
        ctx.mark_non_differentiable(whole)
        return whole, *outs

    @staticmethod
    def backward(ctx, _, *grads: Tensor):
        whole, *weights = ctx.saved_tensors
        grad_x = multiply_and_scatter(torch.cat(grads, -1), torch.cat(weights), ctx.group)
        grad_weights = [
            grad.flatten(0, 1).t() @ whole.flatten(0, 1) if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad[2:], strict=True)
        ]
        return grad_x, None, *grad_weights


class _Row(torch.autograd.Function):
    """x [B, S, F/n], weight [D, F/n] -> the sum over ranks of x @ weight^T, [B, S/n, D]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return multiply_and_scatter(x, weight.t(), group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        whole, (grad_x,) = gather_and_multiply(grad, [weight], ctx.group)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = whole.flatten(0, 1).t() @ x.flatten(0, 1)
        return grad_x, grad_weight, None


def gather_and_multiply(
    x: Tensor, matrices: list[Tensor], group: ProcessGroup
) -> tuple[Tensor, list[Tensor]]:
    """The positions of all ranks, and their product with each matrix."""
    if x.is_cuda:
        return torch.ops.symm_mem.fused_all_gather_matmul(
            x.contiguous(), matrices, POSITIONS, group.group_name
        )
    whole = collectives.all_gather(x, POSITIONS, group)
    return whole, [whole @ matrix for matrix in matrices]


def multiply_and_scatter(x: Tensor, matrix: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's positions of the sum over ranks of the products."""
    if x.is_cuda:
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(
            x.contiguous(), matrix.contiguous(), "sum", POSITIONS, group.group_name
        )
    return collectives.sum_and_scatter(x @ matrix, POSITIONS, group)
