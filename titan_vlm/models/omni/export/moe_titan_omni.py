"""Mixture-of-experts layers of OmniMoE, as they answer: no noise, no drops.

    x_TD -> router -> weights_TE, 0 where a token does not go -> experts -> y_TD (+ shared expert)

`config`: the dictionary "moe" of a branch in config.json, a section [moe.*] of titan_vlm.

Shapes: T tokens, D width, E experts, K experts of a token, G groups, F expert width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Buffers by which a router chooses (or, of expert choice, that it only keeps), never weights by.
STEERING = {
    "bias": ("bias_E",),
    "threshold": ("threshold_E", "steps"),
    "expert_choice": ("load_ema_E", "importance_ema_E", "steps"),
}


class MoE(nn.Module):
    """[T, D] -> [T, out]."""

    def __init__(self, width: int, out: int, config: dict):
        super().__init__()
        self.router = Router(width, config)
        self.experts = Experts(width, out, config)
        if config["shared_width"]:
            self.shared = SharedExpert(width, config["shared_width"], out, config["shared_gate"])

    def forward(self, x_TD: Tensor, lens: list[int] | None = None) -> Tensor:
        """`lens`: tokens of each picture, of which expert choice takes some."""
        y_TD = self.experts(x_TD, self.router(x_TD, lens))
        return y_TD + self.shared(x_TD) if hasattr(self, "shared") else y_TD


class Router(nn.Module):
    def __init__(self, width: int, config: dict):
        super().__init__()
        self.config, experts = config, config["experts"]
        self.weight = nn.Parameter(torch.empty(experts, width))
        if config["router"] == "noisy_topk":  # for training alone
            self.noise_weight = nn.Parameter(torch.empty(experts, width))
        kind = "bias" if config["bias_update"] != "none" else config["router"]
        if kind in STEERING:
            self.steering = nn.Module()
            for name in STEERING[kind]:
                shape = () if name == "steps" else experts
                self.steering.register_buffer(name, torch.zeros(shape))

    def forward(self, x_TD: Tensor, lens: list[int] | None) -> Tensor:
        """Weights [T, E], in float32 at least."""
        config = self.config
        exact = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = F.linear(x_TD.to(exact), self.weight.to(exact))
        scores_TE = logits_TE.sigmoid() if config["score"] == "sigmoid" else logits_TE.softmax(-1)
        chosen_TE = self._choose(logits_TE, scores_TE, lens)
        top_k = config["router"] in ("topk", "noisy_topk")
        normalized = config["score"] == "softmax" and config["normalize"]
        if top_k and (config["score"] == "softmax_topk" or normalized):
            weights_TE = logits_TE.masked_fill(~chosen_TE, -math.inf).softmax(-1)
        else:
            weights_TE = scores_TE * chosen_TE
            if config["normalize"]:
                weights_TE = weights_TE / weights_TE.sum(-1, keepdim=True).clamp(min=1e-20)
        return weights_TE * config["route_scale"]

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, lens: list[int] | None) -> Tensor:
        """[T, E] bool."""
        config, by_TE = self.config, logits_TE
        if config["router"] == "expert_choice":
            return expert_choice(scores_TE, lens, config)
        if config["router"] == "threshold" and self.steering.steps > 0:
            return scores_TE > self.steering.threshold_E.to(scores_TE.dtype)
        if config["bias_update"] != "none" or config["n_groups"] > 1:
            by_TE = scores_TE
        if config["bias_update"] != "none":
            by_TE = by_TE + self.steering.bias_E.to(by_TE.dtype)
        if config["n_groups"] > 1:
            by_TE = best_groups(by_TE, config["n_groups"], config["topk_groups"])
        best_TK = by_TE.topk(config["top_k"], dim=-1).indices
        return torch.zeros_like(by_TE, dtype=torch.bool).scatter(1, best_TK, True)


def best_groups(scores_TE: Tensor, groups: int, chosen: int) -> Tensor:
    """`scores_TE`, -inf outside of each token's best groups by the sum of their two best."""
    scores_TGe = scores_TE.unflatten(-1, (groups, -1))
    groups_TG = scores_TGe.topk(min(2, scores_TGe.shape[-1]), dim=-1).values.sum(-1)
    best = groups_TG.topk(chosen, dim=-1).indices
    inside_TG = torch.zeros_like(groups_TG, dtype=torch.bool).scatter(-1, best, True)
    return scores_TGe.masked_fill(~inside_TG.unsqueeze(-1), -math.inf).flatten(-2)


def expert_choice(scores_TE: Tensor, lens: list[int], config: dict) -> Tensor:
    """[T, E] bool: each expert takes the best of every picture's tokens (or of every `ec_chunk` of
    them), an even share of them times `capacity_factor`; of equal ones the earlier."""
    share = config["capacity_factor"] * config["top_k"]
    sizes = [
        min(config["ec_chunk"] or n, n - start)
        for n in lens
        for start in range(0, n, config["ec_chunk"] or max(n, 1))
    ]
    taken = []
    for part_TE in scores_TE.split(sizes):
        order_TE = (-part_TE).argsort(dim=0, stable=True)
        room = math.ceil(share * len(part_TE) / config["experts"])
        taken.append(order_TE.argsort(0) < room)
    taken_TE = torch.cat(taken)
    if config["ec_fallback"]:  # a token that nobody took has its best expert
        best_T1 = scores_TE.argmax(-1, keepdim=True)
        alone_T1 = ~taken_TE.any(-1, keepdim=True)
        taken_TE = taken_TE.scatter(1, best_T1, taken_TE.gather(1, best_T1) | alone_T1)
    return taken_TE


class Experts(nn.Module):
    """down(silu(gate(x)) * up(x) * weight) of each expert, gate_up [E, D, 2F], gate first; or
    down(gelu(up(x)) * weight), up [E, D, F]."""

    def __init__(self, width: int, out: int, config: dict):
        super().__init__()
        experts, hidden = config["experts"], config["expert_width"]
        self.gated = config["activation"] == "swiglu"
        self.name, units = ("gate_up", 2 * hidden) if self.gated else ("up", hidden)
        first = nn.Parameter(torch.empty(experts, width, units))
        self.register_parameter(self.name, first)
        self.down = nn.Parameter(torch.empty(experts, hidden, out))
        if config["expert_bias"]:
            first_bias = nn.Parameter(torch.empty(experts, 1, units))
            self.register_parameter(f"{self.name}_bias", first_bias)
            self.down_bias = nn.Parameter(torch.empty(experts, 1, out))

    def forward(self, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
        y_TD = x_TD.new_zeros(len(x_TD), self.down.shape[-1])
        for e in weights_TE.any(0).nonzero().flatten().tolist():
            own_P = weights_TE[:, e].nonzero().squeeze(-1)
            weights_P1 = weights_TE[own_P, e, None].to(x_TD.dtype)
            first_PF = x_TD[own_P] @ getattr(self, self.name)[e]
            if hasattr(self, "down_bias"):
                first_PF = first_PF + getattr(self, f"{self.name}_bias")[e]
            if self.gated:
                gate, up = first_PF.chunk(2, -1)
                hidden_PF = F.silu(gate) * up
            else:
                hidden_PF = F.gelu(first_PF, approximate="tanh")
            part_PD = (hidden_PF * weights_P1) @ self.down[e]
            if hasattr(self, "down_bias"):
                part_PD = part_PD + self.down_bias[e] * weights_P1
            y_TD = y_TD.index_add(0, own_P, part_PD)
        return y_TD


class SharedExpert(nn.Module):
    """What every token passes, perhaps scaled by a sigmoid of the token."""

    def __init__(self, width: int, hidden: int, out: int, gated: bool):
        super().__init__()
        self.mlp = SwiGLU(width, hidden, out)
        self.gate = nn.Linear(width, 1, bias=False) if gated else None

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.mlp(x_TD)
        return y_TD if self.gate is None else self.gate(x_TD).sigmoid() * y_TD


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
