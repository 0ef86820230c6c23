"""Where a Qwen3-VL has experts, and how they are routed: the section [moe] laid over a flavour."""

from dataclasses import fields, replace

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import MoE, MoEConfig, chosen_layers
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig


def with_experts(config: Qwen3VLConfig, moe: MoE) -> Qwen3VLConfig:
    """The same model, routed and populated as `[moe]` says.

    Raises:
        ConfigError: experts without dimensions, or in layers that are not there; names the key.
    """
    text, vision, wanted = config.text, config.vision, moe.text
    experts = text.num_experts if wanted.experts < 0 else wanted.experts
    dims = {
        "num_experts": experts,
        "num_experts_per_tok": wanted.top_k or text.num_experts_per_tok,
        "moe_intermediate_size": wanted.expert_width or text.moe_intermediate_size,
    }
    if wanted.layers or wanted.every:
        chosen = chosen_layers(wanted, text.num_layers)
        if not chosen:
            raise ConfigError(
                f"moe.text.every = {wanted.every}: there are {text.num_layers} layers"
            )
        dense = tuple(i for i in range(text.num_layers) if i not in chosen)
        dims |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    mergers = 1 + len(vision.deepstack_layers)
    _check("text", wanted, text.num_layers, experts, dims["num_experts_per_tok"])
    _check("vision", moe.vision, vision.depth, moe.vision.experts, moe.vision.top_k)
    _check("projector", moe.projector, mergers, moe.projector.experts, moe.projector.top_k)
    for key in ("layers", "every"):
        if value := getattr(moe.projector, key):
            raise ConfigError(
                f"moe.projector.{key} = {value}: leave it out, it is for text and vision; all "
                "mergers have experts"
            )
    return replace(
        config,
        text=replace(text, **dims, moe=wanted),
        vision=replace(vision, moe=moe.vision, projector_moe=moe.projector),
    )


def _check(branch: str, moe: MoEConfig, depth: int, experts: int, top_k: int) -> None:
    """What only the dimensions of a branch can refuse."""
    if beyond := [i for i in moe.layers if i >= depth]:
        raise ConfigError(f"moe.{branch}.layers: {beyond} of {depth} layers, counted from 0")
    if experts <= 0:
        default = MoEConfig()
        ignored = [f.name for f in fields(moe) if getattr(moe, f.name) != getattr(default, f.name)]
        if moe.experts < 0 and ignored:
            raise ConfigError(
                f"moe.{branch}.{ignored[0]}: this model has no experts there; set experts, top_k "
                "and expert_width, or leave it out"
            )
        return
    if experts % moe.n_groups:
        raise ConfigError(
            f"moe.{branch}.n_groups: expected a divisor of the {experts} experts, got "
            f"{moe.n_groups}"
        )
    if top_k > experts:
        raise ConfigError(
            f"moe.{branch}.top_k: expected at most the {experts} experts of a layer, got {top_k}"
        )
    within = experts // moe.n_groups * moe.topk_groups
    if top_k > within:
        raise ConfigError(
            f"moe.{branch}.topk_groups: {moe.topk_groups} of {moe.n_groups} groups hold {within} "
            f"experts, a token needs {top_k}"
        )
    if moe.bias_update == "quantile" and top_k == experts:
        raise ConfigError(
            f'moe.{branch}.bias_update = "quantile": nothing to balance where each token has all '
            f"{experts} experts"
        )
