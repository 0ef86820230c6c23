"""Which part of a parameter this rank holds."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """The plain tensor with this rank's part, and where in the whole it lies.

    A tensor that is not sharded is its own and only part. A part may be empty.
    """
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, n) for n in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    where = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    return tensor.to_local(), where


@torch.no_grad()
def copy_into(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, of which a sharded parameter takes its part (no communication)."""
    part, where = local_part(parameter)
    part.copy_(whole[where])
