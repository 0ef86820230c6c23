"""The output head, which leaves to its caller what is done with the vocabulary matrix."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (hidden [B, S, D], weight [V, D]) -> anything: logits by default, or directly a loss that
# never holds all logits.
Head = Callable[[Tensor, Tensor], Tensor]


class LMHead(nn.Module):
    """Projection to the vocabulary, `weight` [V, D].

    A module of its own, so that a sharded weight is whole while `head` runs.
    """

    def __init__(self, width: int, vocab: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))

    def forward(self, hidden_BSD: Tensor, head: Head = F.linear) -> Tensor:
        return head(hidden_BSD, self.weight)
