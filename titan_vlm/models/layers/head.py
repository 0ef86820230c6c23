"""The output head, which leaves to its caller what is done with the vocabulary matrix."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# (hidden [B, S, D], weight [V, D]) -> anything: logits by default, or directly a loss that
# never holds all logits. Under tensor parallelism the weight is a DTensor, sharded over V.
Head = Callable[[Tensor, Tensor], Tensor]


def logits(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    """[..., D] -> [..., V], of a sharded vocabulary too."""
    return F.linear(hidden, whole(weight_VD))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class LMHead(nn.Module):
    """Projection to the vocabulary, `weight` [V, D].

    A module of its own, so that a sharded weight is whole while `head` runs.
    """

    def __init__(self, width: int, vocab: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))

    def forward(self, hidden_BSD: Tensor, head: Head = logits) -> Tensor:
        return head(hidden_BSD, self.weight)
