"""The MoE layer: route, dispatch, experts, combine."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from titan_vlm.models.layers.mlp import SwiGLU
from titan_vlm.models.moe import noise, timing
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.dispatcher import LocalDispatcher
from titan_vlm.models.moe.experts import Experts
from titan_vlm.models.moe.placement import place
from titan_vlm.models.moe.router import Router
from titan_vlm.models.moe.tokens import Tokens, runs_again


class MoE(nn.Module):
    """Replaces a feed-forward layer.

    Args:
        hidden: units of an expert.
        config: how tokens are routed, and what else there is; by default as in Qwen3.
        out: width of the output, if it is another one.
        name: of this layer in the model; noise is drawn by it.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        config: MoEConfig | None = None,
        out: int | None = None,
        name: str = "",
    ):
        super().__init__()
        config = config or MoEConfig()
        self.router = Router(width, num_experts, top_k, config, name)
        self.experts = Experts(
            num_experts, width, hidden, out or width, config.expert_bias, config.activation
        )
        if config.shared_width:
            self.shared = SharedExpert(width, config.shared_width, out or width, config.shared_gate)
        self.dropout = config.dropout
        self.dispatcher = LocalDispatcher()
        self.slots_E = self.replicas_E = None  # expert e in slot e; `set_slots` makes them buffers
        self.clock = timing.Clock()

    # The sizes of the groups depend on the data: a compiler would specialise on one batch's.
    @torch.compiler.disable
    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        """[T, D] -> [T, D]; zeros where a token is not in `tokens`, but for the shared expert."""
        run = partial(self._run, tokens=tokens)
        if self.training and tokens.moment.observe and not runs_again():
            return timing.timed_layer(run, x_TD, self.clock)
        return run(x_TD)

    def _run(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        with record_function("moe.route"):
            routing = self.router(x_TD, tokens)
        with record_function("moe.dispatch"):
            routing = place(routing, self.slots_E, self.replicas_E)
            rows_RD, state = self.dispatcher.dispatch(x_TD, routing)
            timing.count_rows(state.layout)
        with record_function("moe.experts"):
            rows_RD = self.experts(rows_RD, state.layout)
        with record_function("moe.combine"):
            # The shared expert computes while rows travel back.
            meanwhile = partial(self.shared, x_TD) if hasattr(self, "shared") else None
            out_TD = self.dispatcher.combine(rows_RD, state, meanwhile)
        if self.training and self.dropout:
            return noise.dropout(out_TD, tokens, self.router.name, self.dropout)
        return out_TD


class SharedExpert(nn.Module):
    """What every token passes (DeepSeekMoE, arXiv 2401.06066), with a gate as in Qwen2-MoE."""

    def __init__(self, width: int, hidden: int, out: int, gated: bool):
        super().__init__()
        self.mlp = SwiGLU(width, hidden, out)
        self.gate = nn.Linear(width, 1, bias=False) if gated else None

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.mlp(x_TD)
        return y_TD if self.gate is None else F.sigmoid(self.gate(x_TD)) * y_TD


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The MoE layers of a model by the names of their blocks, in the order they run."""
    return {
        name.removesuffix(".moe"): module
        for name, module in model.named_modules()
        if isinstance(module, MoE)
    }
