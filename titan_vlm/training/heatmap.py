"""A matrix as a picture, without a plotting library."""

import torch
from torch import Tensor

# Dark blue (0) over green (1, an even share) to yellow (2 and more); steps of equal brightness.
_COLOURS = torch.tensor(
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]],
    dtype=torch.float64,
)
_HIGHEST = 2.0
_CELL = 8  # pixels


def heat_map(load_LE: Tensor) -> Tensor:
    """[layers, experts] -> uint8 picture [3, layers * 8, experts * 8]; row 0 is the first layer."""
    last = len(_COLOURS) - 1
    place = (load_LE.double() / _HIGHEST).clamp(0, 1) * last
    below = place.floor().clamp(max=last - 1).long()
    weight = (place - below).unsqueeze(-1)
    colours = torch.lerp(_COLOURS[below], _COLOURS[below + 1], weight)
    pixels = colours.round().to(torch.uint8).permute(2, 0, 1)
    return pixels.repeat_interleave(_CELL, 1).repeat_interleave(_CELL, 2)
