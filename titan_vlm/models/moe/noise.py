"""Random numbers that no mesh can change, for routers and dropout.

Each number is a hash of (seed, step, layer, site, sample, place in the sample, column): a rank
draws for the tokens it happens to hold what any other rank would have drawn for them, in any order,
and drawing again (activation checkpointing) gives the same. The hash is SplitMix64's finaliser
(Steele et al. 2014, "Fast splittable pseudorandom number generators"), on int64 tensors, whose
arithmetic wraps around on every device.
"""

import torch
from torch import Tensor

from titan_vlm.models.moe.tokens import Tokens, name_key

# Numbers that are hashed at a time: what lies between a token and its numbers is 32 bytes for each.
BLOCK = 2**20


def uniform(
    tokens: Tokens, layer: str, site: str, width: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[V, width] numbers from the open interval (0, 1), in blocks of tokens.

    Args:
        layer, site: name the layer, and the place within it that draws.
        dtype: rounded to another than float64, the largest may be 1.
    """
    moment = tokens.moment
    stream = name_key(f"{moment.seed}/{moment.step}/{layer}/{site}")
    sample_V = _mix(tokens.keys_N ^ stream).index_select(0, tokens.sequence_V)
    token_V = _mix(sample_V + tokens.place_V * _GOLDEN)
    columns = torch.arange(width, device=token_V.device) * _GOLDEN
    draws = torch.empty(len(token_V), width, dtype=dtype, device=token_V.device)
    rows = max(1, BLOCK // max(1, width))
    for out, part_V in zip(draws.split(rows), token_V.split(rows), strict=True):
        bits = _shift(_mix(part_V.unsqueeze(1) + columns), 12)
        # With a bit more the largest would round to 1.
        out.copy_(bits.double().mul_(2.0**-52).add_(2.0**-53))
    return draws


def dropout(x_TD: Tensor, tokens: Tokens, layer: str, rate: float) -> Tensor:
    """`x_TD` with a part of the tokens' numbers, as large as `rate`, set to 0 and the others scaled
    up (Srivastava et al. 2014)."""
    kept_VD = uniform(tokens, layer, "dropout", x_TD.shape[1], torch.float32) >= rate
    factors_VD = kept_VD.to(x_TD.dtype) / (1 - rate)
    return x_TD * torch.ones_like(x_TD).index_copy_(0, tokens.index_V, factors_VD)


def jitter(tokens: Tokens, layer: str, width: int, eps: float, dtype: torch.dtype) -> Tensor:
    """[V, width] factors from 1 - eps to 1 + eps."""
    draws = uniform(tokens, layer, "jitter", width, dtype)
    return draws.mul_(2 * eps).add_(1 - eps)


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
