"""The MoE layer: route, dispatch, experts, combine."""

import torch
from torch import Tensor, nn

from titan_vlm.models.moe.dispatcher import LocalDispatcher
from titan_vlm.models.moe.experts import Experts
from titan_vlm.models.moe.router import TopKRouter
from titan_vlm.models.moe.routing import Routing


class MoE(nn.Module):
    """Replaces a feed-forward layer. `load_E` counts the pairs each expert got in training."""

    def __init__(self, width: int, hidden: int, num_experts: int, top_k: int):
        super().__init__()
        self.router = TopKRouter(width, num_experts, top_k)
        self.experts = Experts(num_experts, width, hidden)
        self.dispatcher = LocalDispatcher()
        self.register_buffer(
            "load_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False
        )

    # The sizes of the groups depend on the data: a compiler would specialise on one batch's.
    @torch.compiler.disable
    def forward(self, x_TD: Tensor, valid_index_T: Tensor) -> Tensor:
        """[T, D] -> [T, D]; zeros where a token is not in `valid_index_T`."""
        routing = self.router(x_TD, valid_index_T)
        self._count(routing)
        rows_RD, state = self.dispatcher.dispatch(x_TD, routing)
        return self.dispatcher.combine(self.experts(rows_RD, state.layout), state)

    @torch.no_grad()
    def _count(self, routing: Routing) -> None:
        # Activation checkpointing runs the forward pass again inside the backward pass; those
        # pairs are counted already. (The test torch.utils.checkpoint itself uses.)
        if self.training and torch._C._current_graph_task_id() == -1:
            self.load_E += routing.counts_E
