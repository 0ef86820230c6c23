"""The one representation every router ends in: a flat list of (token, expert, weight) pairs.

Four tokens, three experts, top-2, token 2 is padding:

    token_ids_P  = [0 0  1 1  3 3]
    expert_ids_P = [2 0  0 1  2 1]
    weights_P    = [.7 .3  .6 .4  .9 .1]

A padding token, or a pair dropped by a capacity, is simply in no pair. Dispatchers, experts and
metrics read nothing else, so they are written once for every way of routing.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class Routing:
    """P kept pairs, in ascending order of the token.

    token_ids_P   int64, index into the layer's T tokens
    expert_ids_P  int64, logical expert
    weights_P     float32 at least, weight of the expert's output; carries the router's gradient
    num_experts   E
    """

    token_ids_P: Tensor
    expert_ids_P: Tensor
    weights_P: Tensor
    num_experts: int

    @cached_property
    def counts_E(self) -> Tensor:
        """Pairs per expert, int64."""
        return count(self.expert_ids_P, self.num_experts)


def count(ids_P: Tensor, num: int) -> Tensor:
    """How often each of 0 ... num - 1 stands in `ids_P`, int64. (`bincount` waits for a GPU.)"""
    return ids_P.new_zeros(num).scatter_add_(0, ids_P, torch.ones_like(ids_P))
