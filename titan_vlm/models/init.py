"""Initial values of parameters: a function of (seed, global name, logical expert) alone.

Every tensor, and every expert within a tensor of experts, has a random stream of its own. So a
rank makes just the experts it holds, and every mesh and every device starts from the same model.
"""

import hashlib
from collections.abc import Container

import torch
from torch import Tensor, nn

from titan_vlm.models.shards import local_part


@torch.no_grad()
def init_weights(
    model: nn.Module, seed: int, std: float, but: Container[str] = frozenset()
) -> None:
    """Fill every parameter of `model`: matrices from N(0, std^2), norms with 1, biases with 0; only
    those not whose names are in `but`.

    Numbers are drawn on the CPU in float32, so that they depend on neither device nor dtype. Of a
    sharded parameter a rank fills its part.
    """
    for name, parameter in model.named_parameters():
        if name in but:
            continue
        part, where = local_part(parameter)
        if parameter.ndim == 1 or name.endswith("bias"):
            part.fill_(0.0 if name.endswith("bias") else 1.0)
        elif parameter.ndim == 3:
            first, *inside = where
            for expert, matrix in zip(range(first.start, first.stop), part, strict=True):
                whole = normal(parameter.shape[1:], std, seed, f"{name}/{expert}")
                matrix.copy_(whole[tuple(inside)])
        elif part.numel():
            part.copy_(normal(parameter.shape, std, seed, name)[where])


def normal(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    """Normal numbers of a stream of their own, named by (seed, name)."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
