"""How a branch's layers choose experts: the sections [moe.text], [moe.vision], [moe.projector].

`docs/moe.md` tells which to choose. Nothing here imports torch: a mistake is reported before
anything is launched.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from titan_vlm.settings import setting

# Routers whose tokens do not all have K experts.
RAGGED = ("expert_choice", "threshold")
# Dispatchers that are libraries of their own.
LIBRARIES = ("deepep", "hybridep", "uccl_ep")
LOSSES = ("aux_loss", "sequence_loss", "importance_loss", "z_loss", "cv_importance", "cv_load")


def _coefficient(text: str) -> float:
    return setting(0.0, text, at_least=0)


def _curve(name: str) -> dict[str, float]:
    return setting(
        {},
        f"Factors on {name} by step, linear in between and constant outside, "
        "e.g. { 0 = 1.0, 1000 = 0.1 }. Empty: 1.",
        at_least=0,
    )


@dataclass(frozen=True)
class Anneal:
    """A factor for each coefficient, by step."""

    aux_loss: dict[str, float] = _curve("aux_loss")
    sequence_loss: dict[str, float] = _curve("sequence_loss")
    importance_loss: dict[str, float] = _curve("importance_loss")
    z_loss: dict[str, float] = _curve("z_loss")
    cv_importance: dict[str, float] = _curve("cv_importance")
    cv_load: dict[str, float] = _curve("cv_load")


@dataclass(frozen=True)
class FusedOptions:
    """Of the dispatchers deepep, hybridep and uccl_ep, with the meaning of NeMo Automodel's
    `TokenDispatcherConfig`."""

    num_sms: int = setting(
        0,
        "Multiprocessors that the exchange occupies; 0: 20, and 24 with hybridep.",
        at_least=0,
    )
    share_buffer: bool = setting(
        True, "One communication buffer for all layers instead of one for each."
    )
    async_dispatch: bool = setting(
        False,
        "deepep and uccl_ep: exchange on the library's stream, into memory of that stream; the "
        "layer's stream waits for it on the device.",
    )
    permute_fusion: bool = setting(
        False, "hybridep: sort by expert in the kernel that exchanges instead of after it."
    )
    pad_multiple: int = setting(
        32, "hybridep: each expert's rows are filled up to a multiple of it.", at_least=1
    )


@dataclass(frozen=True)
class MoEConfig:
    # ---- experts
    experts: int = setting(
        -1,
        "Experts of a layer; 0: none, dense layers; -1: as the model flavour has it.",
        at_least=-1,
    )
    top_k: int = setting(0, "Experts of a token; 0: as the model flavour has it.", at_least=0)
    expert_width: int = setting(
        0, "Hidden units of an expert; 0: as the model flavour has it.", at_least=0
    )
    layers: list[int] | Literal["all", "deep_half"] = setting(
        [],
        "text, vision: the layers with experts, from 0 on; or all, or those of the deeper half. "
        "Empty: moe.*.every decides. (A projector has them in all its parts.)",
        at_least=0,
    )
    every: int = setting(
        0,
        "text, vision: every n-th layer has experts (n = 2: layers 1, 3, 5); 0: as the model "
        "flavour has it, or all.",
        at_least=0,
    )
    activation: Literal["swiglu", "gelu"] = setting(
        "swiglu", "Of the experts: down(silu(gate x) * up x), or down(gelu(up x)) as in towers."
    )
    asleep: list[int] = setting(
        [],
        "text, vision: layers with experts that send every token to expert 0 with weight 1, as a "
        "dense layer would; the others begin as its copies in the stage that wakes them "
        "(docs/curriculum.md).",
        at_least=0,
    )
    expert_bias: bool = setting(False, "Whether the experts' products have biases.")
    shared_width: int = setting(
        0, "Hidden units of a shared expert that every token passes; 0: none.", at_least=0
    )
    shared_gate: bool = setting(
        False, "Scale the shared expert by a sigmoid of the token (Qwen2-MoE)."
    )
    dropout: float = setting(
        0.0,
        "In training: part of the numbers of the layer's output, before it is added to the hidden "
        "states, that becomes 0 (as Shazeer 2017); the others are scaled up.",
        at_least=0,
        below=1,
    )
    upcycle_shards: int = setting(
        0,
        "text: checkpoint.initial_load_path (or model.text_path) is dense, and every expert begins "
        "as a copy of its layer's MLP (1) or as one of so many shards of it; 0: it has experts. "
        "vision: the same of model.vision_path, with activation = gelu and expert_bias = true.",
        at_least=0,
    )
    upcycle_noise: float = setting(
        0.0, "With upcycle_shards: noise on each expert, relative to its weights.", at_least=0
    )
    # ---- router
    router: Literal["topk", "noisy_topk", "expert_choice", "threshold", "random", "balanced"] = (
        setting(
            "topk",
            "Who chooses: each token its top_k experts; the same under learned noise (Shazeer "
            "2017); each expert its tokens; each expert all above its threshold; chance or a fixed "
            "turn, for benchmarks.",
        )
    )
    score: Literal["softmax", "softmax_topk", "sigmoid"] = setting(
        "softmax",
        "From logits to scores: softmax over all experts, softmax over the chosen ones, sigmoid.",
    )
    normalize: bool = setting(True, "Let the weights of a token's experts sum to 1.")
    route_scale: float = setting(1.0, "Factor on the weights.", above=0)
    noise: Literal["none", "jitter", "rsample"] = setting(
        "none",
        "In training: multiply the gate's input by 1 +- noise_eps, or choose by logits plus Gumbel "
        "noise.",
    )
    noise_eps: float = setting(0.01, "Half width of jitter.", above=0, below=1)
    n_groups: int = setting(1, "Groups that the experts of a layer are divided into.", at_least=1)
    topk_groups: int = setting(
        1, "Groups a token may choose from; the best by the sum of their two best.", at_least=1
    )
    ec_chunk: int = setting(
        0,
        "expert_choice: tokens an expert chooses among; 0: the whole document or picture.",
        at_least=0,
    )
    ec_fallback: bool = setting(
        True, "expert_choice: a token that no expert chose goes to its best expert."
    )
    allow_noncausal: bool = setting(
        False,
        "expert_choice in the text branch: accept that a token's experts depend on later ones.",
    )
    ema_decay: float = setting(
        0.99,
        "Decay by step of the averages: thresholds; load and importance of expert_choice.",
        at_least=0,
        below=1,
    )
    # ---- dispatch
    dispatcher: Literal["local", "all_to_all", "allgather", "deepep", "hybridep", "uccl_ep"] = (
        setting(
            "all_to_all",
            "How tokens reach experts on other ranks: pair by pair; all of them to all ranks (the "
            "reference); by the libraries of these names; or local, with all experts on each rank, "
            "as where nothing is spread.",
        )
    )
    fused: FusedOptions = field(default_factory=FusedOptions)
    # ---- capacity
    capacity_factor: float = setting(
        0.0,
        "expert_choice: tokens an expert takes, as a multiple of an even share. Other routers: the "
        "most it takes, the others are dropped; 0 drops none.",
        at_least=0,
    )
    min_capacity: int = setting(
        4, "With capacity_factor: an expert takes at least this many.", at_least=0
    )
    capacity_scope: Literal["sequence", "batch", "rank"] = setting(
        "sequence",
        "What the even share is of: a document or picture, the rows of one micro-batch index of "
        "all ranks, or this rank's part of them (depends on the mesh; for comparisons only).",
    )
    drop: Literal["position", "score"] = setting(
        "position", "What an expert without room drops: the last tokens, or the least scored."
    )
    # ---- balance
    aux_loss: float = _coefficient(
        "Coefficient of the Switch loss over the global batch; 1 is perfect balance."
    )
    sequence_loss: float = _coefficient(
        "Coefficient of the same per document or picture (DeepSeek-V3's complementary loss)."
    )
    importance_loss: float = _coefficient("Coefficient of importance x load of the pairs made.")
    z_loss: float = _coefficient("Coefficient of the mean squared logsumexp (ST-MoE).")
    cv_importance: float = _coefficient(
        "Coefficient of the squared variation of importance (Shazeer 2017)."
    )
    cv_load: float = _coefficient(
        "Coefficient of the squared variation of the smooth load (noisy_topk only)."
    )
    anneal: Anneal = field(default_factory=Anneal)
    bias_update: Literal["none", "sign", "quantile"] = setting(
        "none",
        "Balance without a loss, by a bias on the scores that only the choice sees, changed after "
        "each step: by bias_speed against the load (DeepSeek-V3), or to where the step would have "
        "been balanced (quantile balancing).",
    )
    bias_speed: float = setting(1e-3, "bias_update sign: change per step.", above=0)
    bias_centred: bool = setting(True, "bias_update sign: keep the mean bias at 0.")

    def coefficient(self, loss: str, step: int) -> float:
        """Of a loss, at a step counted from 0."""
        points = sorted((int(at), factor) for at, factor in getattr(self.anneal, loss).items())
        return getattr(self, loss) * _interpolate(points, step)

    @property
    def has_bias(self) -> bool:
        return self.bias_update != "none"

    @property
    def losses(self) -> list[str]:
        """Those with a coefficient."""
        return [name for name in LOSSES if getattr(self, name) > 0]

    @property
    def unlike_qwen3(self) -> list[str]:
        """The keys by which a trained layer computes something else than Qwen3's, which is softmax
        over the top-k that sums to 1."""
        differs = {
            "router": self.router != "topk",
            "score": self.score == "sigmoid",
            "normalize": self.score == "softmax" and not self.normalize,
            "route_scale": self.route_scale != 1.0,
            "n_groups": self.n_groups != 1,
            "bias_update": self.has_bias,
            "activation": self.activation != "swiglu",
            "expert_bias": self.expert_bias,
            "shared_width": self.shared_width > 0,
            "asleep": bool(self.asleep),
        }
        return [key for key, is_different in differs.items() if is_different]


@dataclass(frozen=True)
class MoE:
    """The section [moe]: one for each branch."""

    text: MoEConfig = field(default_factory=MoEConfig)
    vision: MoEConfig = field(default_factory=MoEConfig)
    projector: MoEConfig = field(default_factory=MoEConfig)


def chosen_layers(config: MoEConfig, depth: int) -> tuple[int, ...]:
    """Of `depth` layers those with experts: the list, the deeper half, every n-th, or all."""
    if isinstance(config.layers, str):
        return tuple(range({"all": 0, "deep_half": depth // 2}[config.layers], depth))
    every = config.every or 1
    return tuple(config.layers) or tuple(range(every - 1, depth, every))


def _interpolate(points: list[tuple[int, float]], step: int) -> float:
    if not points:
        return 1.0
    before = [point for point in points if point[0] <= step]
    after = [point for point in points if point[0] > step]
    if not before or not after:
        return (before[-1] if before else after[0])[1]
    (a, low), (b, high) = before[-1], after[0]
    return low + (high - low) * (step - a) / (b - a)


def conflicts(moe: MoE) -> Iterator[str]:
    """Settings of a branch that do not go together, as messages."""
    for branch in ("text", "vision", "projector"):
        for message in _branch_conflicts(getattr(moe, branch), branch):
            yield f"moe.{branch}.{message}"


def _branch_conflicts(config: MoEConfig, branch: str) -> Iterator[str]:
    for loss in LOSSES:
        for step in getattr(config.anneal, loss):
            if not step.isdigit():
                yield f"anneal.{loss}: expected steps as keys, as in {{ 0 = 1.0 }}, got {step!r}"
                return
    ragged = config.router in RAGGED
    # What leaves an upcycled layer's first forward pass as it is.
    may_differ = {"asleep"} | (
        {"shared_width"} if branch == "text" else {"activation", "expert_bias"}
    )
    differs = [key for key in config.unlike_qwen3 if key not in may_differ]
    rules = [
        (
            config.router == "expert_choice" and branch == "text" and not config.allow_noncausal,
            'router = "expert_choice": an expert compares tokens with later ones, so a decoder '
            'sees the future in training and cannot generate as it was trained; use "topk", '
            '"threshold" or bias_update = "quantile", or set allow_noncausal = true (ec_chunk '
            "bounds how far it sees)",
        ),
        (
            config.router == "expert_choice" and not config.capacity_factor,
            'capacity_factor: expected above 0 with router = "expert_choice", e.g. 1.0',
        ),
        (
            ragged and config.score == "softmax_topk",
            f'score = "softmax_topk": with router = "{config.router}" there is no top-k; use '
            '"softmax" or "sigmoid"',
        ),
        (
            config.router == "noisy_topk" and config.score != "softmax_topk",
            'score: expected "softmax_topk" with router = "noisy_topk", as in Shazeer 2017, got '
            f'"{config.score}"',
        ),
        (
            config.noise != "none" and config.router not in ("topk", "expert_choice"),
            f'noise = "{config.noise}": goes with router "topk"'
            f' (jitter also with "expert_choice"), not with "{config.router}"',
        ),
        (
            config.noise == "rsample" and config.router == "expert_choice",
            'noise = "rsample": tokens choose there, not experts; use "jitter"',
        ),
        (
            config.has_bias and config.router != "topk",
            f'bias_update = "{config.bias_update}": needs router = "topk", got "{config.router}"',
        ),
        (
            config.has_bias and config.score == "softmax_topk",
            f'bias_update = "{config.bias_update}": needs scores of all experts: score = "sigmoid" '
            'or "softmax"',
        ),
        (
            config.bias_update == "quantile" and bool(config.losses),
            f"{(config.losses or [''])[0]}: expected 0 with bias_update = "
            '"quantile", which balances by itself',
        ),
        (
            config.drop == "score" and branch == "text" and not config.allow_noncausal,
            'drop = "score": whether a token keeps its expert depends on later ones, so a decoder '
            'sees the future in training; use "position", or set allow_noncausal = true',
        ),
        (
            isinstance(config.layers, list) and len(set(config.layers)) < len(config.layers),
            f"layers: expected each once, got {config.layers}",
        ),
        (
            config.n_groups > 1 and config.router != "topk",
            f'n_groups = {config.n_groups}: needs router = "topk", got "{config.router}"',
        ),
        (
            config.topk_groups > config.n_groups,
            f"topk_groups: expected at most n_groups ({config.n_groups}), got {config.topk_groups}",
        ),
        (
            config.cv_load > 0 and config.router != "noisy_topk",
            f'cv_load: needs router = "noisy_topk", got "{config.router}"',
        ),
        (
            config.upcycle_shards > 0 and branch == "projector",
            "upcycle_shards: leave it out, there is no dense projector",
        ),
        (
            config.upcycle_shards > 0
            and branch == "vision"
            and not (config.activation == "gelu" and config.expert_bias),
            'upcycle_shards: a tower\'s MLPs are like experts with activation = "gelu" and '
            "expert_bias = true",
        ),
        (
            config.upcycle_noise > 0 and not config.upcycle_shards,
            "upcycle_noise: set upcycle_shards with it",
        ),
        (
            config.upcycle_shards > 0 and config.experts <= 0,
            "upcycle_shards: set experts, top_k and expert_width with it",
        ),
        (
            config.upcycle_shards > 0 and bool(differs),
            f"{(differs or [''])[0]}: leave it out with upcycle_shards, or the first forward pass "
            "is not the dense model's",
        ),
        (
            config.upcycle_shards > 0
            and config.experts > 0
            and bool(
                config.experts % config.upcycle_shards or config.top_k % config.upcycle_shards
            ),
            f"upcycle_shards = {config.upcycle_shards}: expected a divisor of experts "
            f"({config.experts}) and of top_k ({config.top_k})",
        ),
        (
            bool(config.asleep) and branch == "projector",
            "asleep: leave it out, it is for text and vision",
        ),
        (
            bool(config.asleep) and config.upcycle_shards > 1,
            f"asleep: expected none with upcycle_shards = {config.upcycle_shards}, of which expert "
            "0 is one; with 1 it is the dense layer",
        ),
        (
            config.shared_gate and not config.shared_width,
            "shared_gate = true: there is no shared expert; set shared_width",
        ),
        (
            bool(config.layers) and config.every > 0,
            f"every = {config.every}: expected 0 where layers says which",
        ),
        (
            config.experts > 0 and not (config.top_k and config.expert_width),
            f"experts = {config.experts}: set top_k and expert_width with it",
        ),
        (
            config.experts == -1
            and bool(config.top_k and config.expert_width)
            and branch != "text",
            "experts: expected a number with top_k and expert_width: the flavour has none here",
        ),
        (
            config.experts > 0 and config.top_k > config.experts,
            f"top_k: expected at most experts ({config.experts}), got {config.top_k}",
        ),
        (
            config.experts > 0 and config.experts % config.n_groups != 0,
            f"n_groups: expected a divisor of experts ({config.experts}), got {config.n_groups}",
        ),
    ]
    for broken, message in rules:
        if broken:
            yield message
    yield from _without_effect(config)


def _without_effect(config: MoEConfig) -> Iterator[str]:
    """Settings that nothing would read."""
    drops = config.capacity_factor > 0 and config.router != "expert_choice"
    chooses = config.router == "expert_choice"
    fused = config.dispatcher in LIBRARIES
    needs = {
        "ec_chunk": (chooses, 'router = "expert_choice"'),
        "ec_fallback": (chooses, 'router = "expert_choice"'),
        "noise_eps": (config.noise == "jitter", 'noise = "jitter"'),
        "ema_decay": (config.router in RAGGED, 'router = "threshold" or "expert_choice"'),
        "min_capacity": (drops, "capacity_factor, and tokens that choose"),
        "capacity_scope": (drops, "capacity_factor, and tokens that choose"),
        "drop": (drops, "capacity_factor, and tokens that choose"),
        "bias_speed": (config.bias_update == "sign", 'bias_update = "sign"'),
        "bias_centred": (config.bias_update == "sign", 'bias_update = "sign"'),
        "topk_groups": (config.n_groups > 1, "n_groups"),
        "fused": (fused, 'dispatcher = "deepep", "hybridep" or "uccl_ep"'),
    }
    default = MoEConfig()
    for key, (read, needed) in needs.items():
        if getattr(config, key) != getattr(default, key) and not read:
            yield f"{key}: does nothing without {needed}"
    for loss in LOSSES:
        if getattr(config.anneal, loss) and not getattr(config, loss):
            yield f"anneal.{loss}: the coefficient {loss} is 0"
