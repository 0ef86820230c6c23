"""Routers: hidden states in, `Routing` out, whatever the kind.

    logits        of the gate, float32 at least, whatever the model's dtype
    scores        softmax or sigmoid of the logits
    choice        pairs of token and expert, by scores plus noise, bias, groups or thresholds;
                  it has no gradient
    weights       of the pairs, from scores without noise or bias: the gradient's way to the gate
    drops         pairs without room, if there is a capacity
    balance       losses whose gradients enter here, too; `balance.py`

`V` tokens that are no padding, `E` experts, `K` of a token, `P` pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_vlm.models.moe import balance, noise, selection
from titan_vlm.models.moe.config import LOSSES, RAGGED, MoEConfig
from titan_vlm.models.moe.peers import Alone
from titan_vlm.models.moe.routing import Routing, count
from titan_vlm.models.moe.steering import Steering, make_steering
from titan_vlm.models.moe.tokens import Tokens, runs_again

# Sums over tokens that a layer keeps for the metrics, beside the pairs of each expert.
SUMS = (
    "micro_batches",
    "tokens",
    "made",
    "kept",
    "lonely",
    "observed",
    "entropy",
    "square",
    *LOSSES,
)


@dataclass
class Chosen:
    """Pairs before drops, in the order of their tokens.

    token_P      which of the V tokens
    experts_P
    scores_P     what a capacity compares
    weights_P    with gradients
    """

    token_P: Tensor
    experts_P: Tensor
    scores_P: Tensor
    weights_P: Tensor


class Router(nn.Module):
    """The gate of a layer and its state. `config` says which kind; by default Qwen3's.

    Buffers of whatever balances without a loss (bias, thresholds, averages) are in `steering`.

    asleep    whether every token goes to expert 0 with weight 1; then the gate is not asked
    load_E    pairs made of each expert in training since it was last zeroed, before drops
    sums      of `SUMS`, over the same time
    placed_E  as load_E, since experts were last moved
    """

    def __init__(self, width: int, num_experts: int, top_k: int, config: MoEConfig, name: str = ""):
        super().__init__()
        self.config, self.name = config, name
        self.num_experts, self.top_k = num_experts, top_k
        self.asleep = name.rpartition(".")[2] in map(str, config.asleep)
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        if config.router == "noisy_topk":
            self.noise_weight = nn.Parameter(torch.empty(num_experts, width))
        self.steering: Steering | None = make_steering(config, num_experts, top_k)
        # Sequences may be split over ranks, batches are. (`parallel/expert.py`)
        self.sequence_peers = self.batch_peers = Alone()
        counters = {
            "load_E": torch.zeros(num_experts, dtype=torch.int64),
            "placed_E": torch.zeros(num_experts, dtype=torch.int64),
            "sums": torch.zeros(len(SUMS), dtype=torch.float64),
            # Of the step under way.
            "seen_E": torch.zeros(num_experts, dtype=torch.float64),
            "broken": torch.zeros(1, dtype=torch.float64),
        }
        for key, zeros in counters.items():
            self.register_buffer(key, zeros, persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Router":
        """`.to(dtype)` is for weights: counts, and what balances by them, stay float64."""
        before = [dict(module._buffers) for module in self.modules()]
        super()._apply(fn, recurse)
        for module, buffers in zip(self.modules(), before, strict=True):
            for name, buffer in module._buffers.items():
                if buffer.is_floating_point() and buffer.dtype != torch.float64:
                    # `fn` has rounded it; a tensor on meta has no numbers to round.
                    exact = buffer if buffers[name].is_meta else buffers[name]
                    module._buffers[name] = exact.to(buffer.device, torch.float64)
        return self

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        """Route `tokens`; the others (padding) are in no pair."""
        again = runs_again()
        counting = self.training and not again
        if self.asleep:
            return self._as_dense(x_TD, tokens, counting)
        with torch.autocast(x_TD.device.type, enabled=False):
            # Where all are tokens there is nothing to pick out.
            x_VD = x_TD if len(tokens) == len(x_TD) else x_TD.index_select(0, tokens.index_V)
            x_VD = x_VD.to(torch.promote_types(x_TD.dtype, torch.float32))
            if self.training and self.config.noise == "jitter":
                eps = self.config.noise_eps
                x_VD = x_VD * noise.jitter(tokens, self.name, x_VD.shape[1], eps, x_VD.dtype)
            logits_VE = F.linear(x_VD, self.weight.to(x_VD.dtype))
            chosen, load_E = self.choose(x_VD, logits_VE, tokens, counting)
            if self.training and self.config.losses:
                chosen.weights_P = self.balance(logits_VE, chosen, load_E, tokens, again)
            kept_P = self.room(chosen, tokens)
            if counting:
                self._count(logits_VE.detach(), chosen, kept_P, tokens)
        pairs = (chosen.token_P, chosen.experts_P, chosen.weights_P)
        if kept_P is not None:
            index = kept_P.nonzero().squeeze(
                -1
            )  # one wait for the device; a mask for each is three
            pairs = tuple(x_P.index_select(0, index) for x_P in pairs)
        token_P, experts_P, weights_P = pairs
        return Routing(
            token_ids_P=tokens.index_V.index_select(0, token_P),
            expert_ids_P=experts_P,
            weights_P=weights_P,
            num_experts=self.num_experts,
        )

    def _as_dense(self, x_TD: Tensor, tokens: Tokens, counting: bool) -> Routing:
        """All to expert 0."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        if counting:
            here = {"tokens": len(tokens), "made": len(tokens), "kept": len(tokens)}
            self.load_E[0] += len(tokens)
            self.placed_E[0] += len(tokens)
            self._add(here | {"micro_batches": 1 / self.batch_peers.size})
        return Routing(
            token_ids_P=tokens.index_V,
            expert_ids_P=torch.zeros_like(tokens.index_V),
            weights_P=torch.ones(len(tokens), dtype=dtype, device=x_TD.device),
            num_experts=self.num_experts,
        )

    # ------------------------------------------------------------------------ choice and weights

    def scores(self, logits_VE: Tensor) -> Tensor:
        """What experts are compared by."""
        return logits_VE.sigmoid() if self.config.score == "sigmoid" else logits_VE.softmax(-1)

    def choose(
        self, x_VD: Tensor, logits_VE: Tensor, tokens: Tokens, counting: bool
    ) -> tuple[Chosen, Tensor | None]:
        """The pairs, before drops; with noisy_topk also the smooth load of each expert."""
        config = self.config
        if config.router in RAGGED:
            return self._ragged(self.scores(logits_VE), tokens, counting), None
        clean_VE, load_E = logits_VE, None
        if config.router == "noisy_topk" and self.training:
            std_VE = F.softplus(F.linear(x_VD, self.noise_weight.to(x_VD.dtype)))
            draws_VE = noise.normal(tokens, self.name, "topk", self.num_experts)
            logits_VE = clean_VE + std_VE * draws_VE.to(std_VE.dtype)
            load_E = balance.smooth_load(clean_VE, logits_VE, std_VE, self.top_k)
        experts_VK = self._experts(logits_VE.detach(), tokens, counting)
        weights_VK = self._weights(logits_VE, experts_VK)
        chosen = Chosen(
            token_P=torch.arange(len(tokens), device=x_VD.device).repeat_interleave(self.top_k),
            experts_P=experts_VK.flatten(),
            scores_P=weights_VK.detach().flatten(),
            weights_P=weights_VK.flatten(),
        )
        return chosen, load_E

    def _experts(self, logits_VE: Tensor, tokens: Tokens, counting: bool) -> Tensor:
        """[V, K] chosen."""
        config, (_, num_experts) = self.config, logits_VE.shape
        if config.router == "balanced":
            return selection.taking_turns(tokens, num_experts, self.top_k)
        if config.router == "random":
            draws_VE = noise.uniform(tokens, self.name, "random", num_experts)
            return draws_VE.topk(self.top_k, dim=-1).indices
        if config.noise == "rsample" and self.training:
            draws_VE = noise.gumbel(tokens, self.name, "rsample", num_experts)
            logits_VE = logits_VE + draws_VE.to(logits_VE.dtype)
        by_VE = logits_VE
        if config.has_bias or config.n_groups > 1:
            by_VE = self.scores(logits_VE)
        if config.has_bias:
            if counting:
                self.steering.look(by_VE)
            by_VE = by_VE + self.steering.bias_E.to(by_VE.dtype)
        if config.n_groups > 1:
            by_VE = selection.best_groups(by_VE, config.n_groups, config.topk_groups)
        return by_VE.topk(self.top_k, dim=-1).indices

    def _weights(self, logits_VE: Tensor, experts_VK: Tensor) -> Tensor:
        config = self.config
        if config.score == "softmax_topk" or (config.score == "softmax" and config.normalize):
            # Normalised softmax over all is softmax over the chosen, in fewer steps.
            weights_VK = logits_VE.gather(1, experts_VK).softmax(-1)
        else:
            weights_VK = self.scores(logits_VE).gather(1, experts_VK)
            if config.normalize:
                weights_VK = weights_VK / weights_VK.sum(-1, keepdim=True).clamp(min=_TINY)
        return weights_VK * config.route_scale if config.route_scale != 1 else weights_VK

    def _ragged(self, scores_VE: Tensor, tokens: Tokens, counting: bool) -> Chosen:
        config = self.config
        if config.router == "expert_choice":
            find = partial(
                selection.expert_choice,
                scores_VE,
                tokens,
                self.sequence_peers,
                config.capacity_factor,
                self.top_k,
                config.ec_chunk,
                config.ec_fallback,
            )
            made_VE = tokens.once((self, "made"), find)
        else:
            made_VE = self.steering.above(scores_VE.detach(), self.top_k)
            if counting:
                self.steering.look(scores_VE.detach())
        token_P, experts_P = made_VE.nonzero().unbind(1)
        scores_P = scores_VE[token_P, experts_P]
        weights_P = scores_P
        if config.normalize:
            sums_V = weights_P.new_zeros(len(tokens)).index_add(0, token_P, weights_P)
            weights_P = weights_P / sums_V.clamp(min=_TINY)[token_P]
        return Chosen(token_P, experts_P, scores_P.detach(), weights_P * config.route_scale)

    def room(self, chosen: Chosen, tokens: Tokens) -> Tensor | None:
        """Which pairs are kept; None where none can be dropped.

        In training only: an answer must not depend on what else is answered, and in evaluation all
        ranks have the same tokens, which `peers` would count as many times.
        """
        config = self.config
        if not self.training or not config.capacity_factor or config.router == "expert_choice":
            return None
        alone = Alone()
        peers = {"sequence": self.sequence_peers, "batch": self.batch_peers, "rank": alone}
        find = partial(
            selection.within_capacity,
            chosen.token_P,
            chosen.experts_P,
            chosen.scores_P,
            tokens,
            self.num_experts,
            self.top_k,
            config.capacity_factor,
            config.min_capacity,
            config.capacity_scope,
            config.drop,
            peers[config.capacity_scope],
        )
        return tokens.once((self, "kept"), find)

    # ------------------------------------------------------------------------ what is observed

    def balance(
        self,
        logits_VE: Tensor,
        chosen: Chosen,
        load_E: Tensor | None,
        tokens: Tokens,
        again: bool,
    ) -> Tensor:
        """The weights; in the backward pass the losses act through them."""
        config, moment = self.config, tokens.moment
        with torch.no_grad():
            unbiased_VK = logits_VE.topk(self.top_k, dim=-1).indices
        probs_VE = self.scores(logits_VE)
        if config.score == "sigmoid":
            probs_VE = probs_VE / probs_VE.sum(-1, keepdim=True).clamp(min=_TINY)
        choice = balance.Choice(
            logits_VE,
            probs_VE,
            unbiased_VK,
            chosen.token_P,
            chosen.experts_P,
            chosen.weights_P,
            load_E,
        )
        sums = balance.sums_of(choice, tokens, config.losses)
        if not again:
            if moment.micro_batch == 0:
                self.seen_E.zero_()
            tokens.memo[self, "slopes"] = balance.find_slopes(
                sums,
                choice,
                tokens,
                {name: config.coefficient(name, moment.step) for name in config.losses},
                self.seen_E,
                self.batch_peers,
                self.sequence_peers,
            )
        slopes = tokens.memo[self, "slopes"].slopes
        return balance.inject(chosen.weights_P, list(sums.values()), slopes)

    @torch.no_grad()
    def _count(
        self, logits_VE: Tensor, chosen: Chosen, kept_P: Tensor | None, tokens: Tokens
    ) -> None:
        pairs_E = count(chosen.experts_P, self.num_experts)
        self.load_E += pairs_E
        self.placed_E += pairs_E
        self.broken += (~logits_VE.isfinite()).any()
        if self.steering is not None:
            self.steering.add(pairs_E, chosen)
        made = chosen.experts_P.numel()
        figures = {
            "tokens": len(tokens),
            "made": made,
            "kept": made if kept_P is None else kept_P.sum(),
        }
        share = 1 / self.batch_peers.size  # these are the same on every rank, and will be summed
        figures["micro_batches"] = share
        if self.config.losses:
            values = tokens.memo[self, "slopes"].values
            figures |= {name: value * share for name, value in values.items()}
        if self.config.router in RAGGED:
            with_pair_V = torch.zeros_like(tokens.place_V).index_fill(0, chosen.token_P, 1)
            figures["lonely"] = len(tokens) - with_pair_V.sum()
        if tokens.moment.observe:
            figures["observed"] = len(tokens)
            figures["entropy"] = torch.special.entr(logits_VE.softmax(-1)).sum()
            figures["square"] = logits_VE.square().mean(-1).sum()
        self._add(figures)

    def _add(self, figures: dict[str, Tensor | float]) -> None:
        for name, figure in figures.items():
            self.sums[SUMS.index(name)] += figure


_TINY = 1e-20
