"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the forms Qwen3-VL uses.

Text: interleaved M-RoPE (Qwen3-VL report, arXiv 2511.21631): every token has a (time, height,
width) position and each rotary frequency listens to one of the three, in the order
t h w t h w ... so that all three cover low and high frequencies.
Vision: half of the frequencies turn with the row of a patch, half with its column.
"""

from functools import cache

import torch
from torch import Tensor

# T tokens, N patches, C head width; a table holds C / 2 angles per token


def frequencies(width: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The width / 2 inverse frequencies theta^(-2i / width), computed in `dtype`."""
    exponents = torch.arange(0, width, 2, dtype=dtype, device=device) / width
    return 1.0 / (theta**exponents)


@cache
def interleaved_axes(sections: tuple[int, int, int]) -> tuple[int, ...]:
    """Which of (t, h, w) each frequency listens to.

    >>> interleaved_axes((4, 2, 2))
    (0, 1, 2, 0, 1, 2, 0, 0)
    """
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for i in range(axis, 3 * sections[axis], 3):
            axes[i] = axis
    return tuple(axes)


def text_tables(
    positions_3T: Tensor,
    width: int,
    theta: float,
    sections: tuple[int, int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, width / 2] of interleaved M-RoPE, angles in float32 at least."""
    exact = torch.promote_types(dtype, torch.float32)
    inverse = frequencies(width, theta, exact, positions_3T.device)
    axes = torch.tensor(interleaved_axes(sections), device=positions_3T.device)
    angles = positions_3T.to(exact)[axes].T * inverse
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_THC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + C / 2) of every head by the token's angles.

    Computes in the wider of the two dtypes and returns that of `x_THC`.
    """
    first, second = x_THC.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_THC.dtype)
