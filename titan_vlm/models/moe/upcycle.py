"""Experts made of a dense SwiGLU layer, so that training goes on from what it knows.

    copy_experts(gate, up, down, E)             every expert is the dense layer
    split_experts(gate, up, down, E, G)         finer ones: each is one of G shards of it
    group_router(E, K, G, ...)                  the router that finer experts start with
    add_noise(weights, relative_std, ...)       experts that are copies, set a little apart

Copies give the dense layer's output with any router whose top-k weights sum to one: all experts
say the same. Shards need a router by which a token meets each shard as often as any other:

    dense columns   [0 1 2 | 3 4 5]             F = 6, G = 2 shards: a b
    expert            0 1   2 3   4 5           E = 6: expert e holds shard e mod G
    shard             a b   a b   a b
    router row        p p   q q   r r           the G experts of one virtual group share a row
    logits            1 1   5 5   3 3           top-2: experts 2 and 3, each shard once

The experts of a group tie, and K is a multiple of G, so the K largest logits are those of K/G whole
groups: no tie within one is ever to be broken. Two groups tie only where a token is at right
angles to the difference of their rows; for random rows that is the token 0, whose output is 0 from
any experts. (With logits rounded to bfloat16 it happens to others, too: keep them in float32.)

With the weight w_g for each expert of group g, a token's output is

    sum_g w_g (a + b + ...) = dense * sum_g w_g = dense / G,    as G * sum_g w_g = 1,

whatever K is and however the groups are weighted: hence the factor G on every expert's output. It
goes into `down`: `gate` is not linear, and G, unlike sqrt(G) in `up` and `down` each, is exact in
every dtype where it is a power of two.

Sources: Komatsuzaki et al. 2022 (arXiv 2212.05055) for copies; He et al. 2024 (arXiv 2410.07524)
for shards, virtual groups and scaling.

E experts, G shards, N = E/G virtual groups, D model width, F dense width, H expert width (F/G).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from titan_vlm.models.init import normal


class ExpertWeights(NamedTuple):
    """The parameters of `Experts`: gate_up [E, D, 2H], gate first; down [E, H, D]."""

    gate_up: Tensor
    down: Tensor


def copy_experts(
    gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, num_experts: int
) -> ExpertWeights:
    """Every expert a copy of the dense layer, whose matrices are those of its `nn.Linear`s.

    Raises:
        ValueError: the matrices do not belong to one SwiGLU layer, or there is no expert.
    """
    return split_experts(gate_FD, up_FD, down_DF, num_experts, num_shards=1)


def split_experts(
    gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, num_experts: int, num_shards: int
) -> ExpertWeights:
    """Expert e is shard e mod G of the dense layer, its output times G.

    Behind the router of `group_router` the layer computes what the dense one did.

    Raises:
        ValueError: the matrices do not belong to one SwiGLU layer; G does not divide F or E.
    """
    hidden, width = gate_FD.shape
    if up_FD.shape != (hidden, width) or down_DF.shape != (width, hidden):
        raise ValueError(
            f"gate {tuple(gate_FD.shape)}, up {tuple(up_FD.shape)} and down {tuple(down_DF.shape)} "
            f"are not one SwiGLU layer: expected [F, D], [F, D], [D, F]"
        )
    groups = _num_groups(num_experts, num_shards)
    if hidden % num_shards:
        raise ValueError(
            f"a dense layer {hidden} wide cannot be split in {num_shards} equal shards"
        )
    gate_GHD = gate_FD.unflatten(0, (num_shards, -1))
    up_GHD = up_FD.unflatten(0, (num_shards, -1))
    gate_up = torch.cat((gate_GHD, up_GHD), dim=1).transpose(1, 2)
    down = down_DF.t().unflatten(0, (num_shards, -1)) * num_shards
    return ExpertWeights(gate_up.repeat(groups, 1, 1), down.repeat(groups, 1, 1))


def group_router(
    num_experts: int, top_k: int, num_shards: int, width: int, std: float, seed: int, name: str
) -> Tensor:
    """The router's weights [E, D]: of each virtual group one row from N(0, std^2), G times.

    Drawn as `init_weights` draws a router of N experts: a function of (seed, name).

    Raises:
        ValueError: G does not divide E or K.
    """
    groups = _num_groups(num_experts, num_shards)
    if top_k % num_shards:
        raise ValueError(
            f"top_k {top_k} with experts that are one of {num_shards} shards: a token would not "
            f"meet every shard as often; top_k must be a multiple of {num_shards}"
        )
    rows_ND = normal(torch.Size((groups, width)), std, seed, name)
    return rows_ND.repeat_interleave(num_shards, 0)


def add_noise(weights: ExpertWeights, relative_std: float, seed: int, name: str) -> ExpertWeights:
    """Each expert's gate, up and down plus N(0, (relative_std * that matrix's RMS)^2).

    The normal numbers are a function of (seed, name, matrix, logical expert) alone: expert 3 of 8
    and expert 3 of 128 get the same. In bfloat16 a relative_std below 0.4% is mostly rounded
    away: add it in float32.

    Args:
        name: of these experts within the model.

    Raises:
        ValueError: `relative_std` is negative.
    """
    if relative_std < 0:
        raise ValueError(f"noise of a negative size, {relative_std}")
    gate, up = weights.gate_up.chunk(2, dim=-1)
    noisy = {
        matrix: perturb(values, relative_std, seed, f"{name}/{matrix}/noise")
        for matrix, values in {"gate": gate, "up": up, "down": weights.down}.items()
    }
    return ExpertWeights(torch.cat((noisy["gate"], noisy["up"]), dim=-1), noisy["down"])


def perturb(matrices_EIO: Tensor, relative_std: float, seed: int, name: str) -> Tensor:
    """Each expert's matrix plus N(0, (relative_std * its RMS)^2), drawn by (seed, name, expert)."""
    noisy = torch.empty_like(matrices_EIO, memory_format=torch.contiguous_format)
    for expert, matrix in enumerate(matrices_EIO):
        exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        noise = normal(matrix.shape, relative_std, seed, f"{name}/{expert}").to(exact)
        noisy[expert] = exact + noise * exact.square().mean().sqrt()
    return noisy


def _num_groups(num_experts: int, num_shards: int) -> int:
    """N, the copies there are of each shard."""
    if num_experts < 1 or num_shards < 1 or num_experts % num_shards:
        raise ValueError(
            f"{num_experts} experts cannot be equally many copies of each of {num_shards} shards: "
            f"their number must be a multiple of {num_shards}"
        )
    return num_experts // num_shards
