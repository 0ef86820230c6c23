"""Where a Qwen3-VL has experts, and how they are routed: the section [moe] laid over a flavour."""

from collections.abc import Sequence
from dataclasses import fields, replace

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import MoE, MoEConfig, chosen_layers
from titan_vlm.models.projector import Projector
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig, TextConfig


def with_settings(config: Qwen3VLConfig, moe: MoE, projector: Projector) -> Qwen3VLConfig:
    """The same model, routed and populated as `[moe]` says.

    Raises:
        ConfigError: experts without dimensions, or in layers that are not there, or settings of
            `[projector]`, which is for other models; names the key.
    """
    for f in fields(projector):
        if getattr(projector, f.name) != getattr(Projector(), f.name):
            raise ConfigError(
                f"projector.{f.name}: leave it out; Qwen3-VL has a projector of its own"
            )
    vision = config.vision
    text = decoder_with_experts(config.text, moe.text)
    mergers = 1 + len(vision.deepstack_layers)
    check_experts("vision", moe.vision, vision.depth, moe.vision.experts, moe.vision.top_k)
    check_projector(moe.projector, mergers)
    vision = replace(vision, moe=moe.vision, projector_moe=moe.projector)
    return replace(config, text=text, vision=vision)


def decoder_with_experts(text: TextConfig, wanted: MoEConfig) -> TextConfig:
    """The same decoder, routed and populated as `[moe.text]` says; raises as `with_settings`."""
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
    check_experts("text", wanted, text.num_layers, experts, dims["num_experts_per_tok"])
    text = replace(text, **dims, moe=wanted)
    if experts > 0:
        check_asleep("text", wanted, [i for i in range(text.num_layers) if text.is_moe_layer(i)])
    return text


def check_projector(moe: MoEConfig, parts: int) -> None:
    """Of a projector of as many `parts`, each with experts or none."""
    check_experts("projector", moe, parts, moe.experts, moe.top_k)
    for key in ("layers", "every"):
        if value := getattr(moe, key):
            raise ConfigError(
                f"moe.projector.{key} = {value}: leave it out, it is for text and vision; all "
                "mergers have experts"
            )


def check_experts(branch: str, moe: MoEConfig, depth: int, experts: int, top_k: int) -> None:
    """What only the dimensions of a branch can refuse."""
    listed = moe.layers if isinstance(moe.layers, list) else []
    if beyond := [i for i in listed if i >= depth]:
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
    if branch == "vision":
        check_asleep(branch, moe, chosen_layers(moe, depth))


def check_asleep(branch: str, moe: MoEConfig, with_experts: Sequence[int]) -> None:
    """Only layers `with_experts` can be asleep."""
    if wrong := sorted(set(moe.asleep) - set(with_experts)):
        raise ConfigError(
            f"moe.{branch}.asleep: expected some of the layers with experts, "
            f"{list(with_experts)}, got {wrong}"
        )
