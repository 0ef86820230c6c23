"""Random numbers for routers that no mesh can change.

Each number is a hash of (seed, step, layer, site, sample, place in the sample, column): a rank
draws for the tokens it happens to hold what any other rank would have drawn for them, in any order,
and drawing again (activation checkpointing) gives the same. The hash is SplitMix64's finaliser
(Steele et al. 2014, "Fast splittable pseudorandom number generators"), on int64 tensors, whose
arithmetic wraps around on every device.
"""

import torch
from torch import Tensor

from titan_vlm.models.moe.tokens import Tokens, name_key


def uniform(tokens: Tokens, layer: str, site: str, width: int) -> Tensor:
    """[V, width] float64 numbers from the open interval (0, 1).

    Args:
        layer, site: name the layer, and the place within it that draws.
    """
    moment = tokens.moment
    stream = name_key(f"{moment.seed}/{moment.step}/{layer}/{site}")
    sample_V = _mix(tokens.keys_N ^ stream).index_select(0, tokens.sequence_V)
    token_V = _mix(sample_V + tokens.place_V * _GOLDEN)
    columns = torch.arange(width, device=token_V.device) * _GOLDEN
    bits = _shift(_mix(token_V.unsqueeze(1) + columns), 12)
    return bits.double() * 2.0**-52 + 2.0**-53  # with a bit more the largest would round to 1


def gumbel(tokens: Tokens, layer: str, site: str, width: int) -> Tensor:
    """[V, width] float64 numbers of the standard Gumbel distribution."""
    return -(-uniform(tokens, layer, site, width).log()).log()


def normal(tokens: Tokens, layer: str, site: str, width: int) -> Tensor:
    """[V, width] float64 numbers of the standard normal distribution."""
    return torch.special.ndtri(uniform(tokens, layer, site, width))


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros following (>> of an int64 repeats its sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)
