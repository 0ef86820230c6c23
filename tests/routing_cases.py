"""Tokens, gates and naive routings, for the tests of routers."""

import math

import torch

from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.router import Router
from titan_vlm.models.moe.tokens import Tokens, tokens_of

WIDTH, EXPERTS, TOP_K = 6, 8, 2
LENS = {
    "three documents and padding": ([5, 9, 3, 4], [1, 1, 1, 0]),
    "one token": ([1], [1]),
    "fewer tokens than experts": ([3], [1]),
    "no token": ([4], [0]),
    "nothing": ([], []),
}


def tokens(case: str) -> Tokens:
    """Sequences of the case; those marked 0 are padding."""
    lens, valid = LENS[case]
    valid_T = torch.tensor(valid, dtype=torch.bool).repeat_interleave(torch.tensor(lens).long())
    return tokens_of(lens, [100 + i for i in range(sum(valid))], valid_T)


def hidden(case: str, kind: str = "random") -> torch.Tensor:
    """[T, D] float64: random, all alike (ties), or such that expert 0 is everybody's best."""
    num_tokens = sum(LENS[case][0])
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, WIDTH, dtype=torch.float64, generator=generator)
    if kind == "ties":
        x_TD = torch.ones_like(x_TD)
    if kind == "hot":
        x_TD[:, 0] = 50.0
    return x_TD.requires_grad_()


def router(**settings) -> Router:
    """In float64, in training."""
    made = Router(WIDTH, EXPERTS, TOP_K, MoEConfig(**settings), "here").double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
        made.weight[:, 0] = 0.0
        made.weight[0, 0] = 1.0  # what `hot` plays on
    return made


def pairs(routing) -> list[tuple[int, int]]:
    """(token, expert) of a routing."""
    return list(zip(routing.token_ids_P.tolist(), routing.expert_ids_P.tolist(), strict=True))


def sequences(of: Tokens) -> list[list[int]]:
    """For each sequence the tokens (by their number among the V) in it."""
    members = [[] for _ in range(of.num_sequences)]
    for v, n in enumerate(of.sequence_V.tolist()):
        members[n].append(v)
    return members


def best(values: list[float], k: int) -> list[int]:
    """Places of the k largest, the first of equals first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def room(factor: float, num_tokens: int) -> int:
    """Tokens that an expert takes."""
    return math.ceil(factor * TOP_K * num_tokens / EXPERTS)
