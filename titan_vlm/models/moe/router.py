"""Routers: hidden states in, `Routing` out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_vlm.models.moe.routing import Routing


class TopKRouter(nn.Module):
    """Softmax over all experts, the K largest, renormalised to sum to one (Qwen3's router).

    Computed as the softmax over the K largest logits, which is the same in fewer steps.
    Logits and everything after them are float32 at least, whatever the model's dtype.
    """

    def __init__(self, width: int, num_experts: int, top_k: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.top_k = top_k

    def forward(self, x_TD: Tensor, valid_index_T: Tensor) -> Routing:
        """Route the tokens at `valid_index_T`; the others (padding) are in no pair."""
        exact = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(exact), self.weight.to(exact))
            logits_TK, experts_TK = logits_TE.topk(self.top_k, dim=-1)
            weights_TK = logits_TK.softmax(-1)
        return Routing(
            token_ids_P=valid_index_T.repeat_interleave(self.top_k),
            expert_ids_P=experts_TK.index_select(0, valid_index_T).flatten(),
            weights_P=weights_TK.index_select(0, valid_index_T).flatten(),
            num_experts=self.weight.shape[0],
        )
