"""What may be split among how many ranks, said without knowing how."""

from collections.abc import Mapping
from dataclasses import replace

from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.qwen3_vl import flops
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig, TextConfig
from titan_vlm.models.units import Unit

# What a pipeline expects of its rows: half of the tokens are visual, 256 of them a picture.
VISUAL_SHARE, VISUAL_TOKENS = 0.5, 256


def divisible(config: Qwen3VLConfig) -> dict[str, dict[str, int]]:
    """For each view of the mesh that splits the model: what it splits, into how many at most."""
    others = {"vision": config.vision.moe, "projector": config.vision.projector_moe}
    return divisible_parts(config.text, others)


def divisible_parts(text: TextConfig, others: Mapping[str, MoEConfig]) -> dict[str, dict[str, int]]:
    """The same of any model with such a decoder, and perhaps with experts in `others`."""
    has_experts = any(text.is_moe_layer(i) for i in range(text.num_layers))
    experts = {"experts of a layer": text.num_experts if has_experts else 1}
    for branch, moe in others.items():
        if moe.experts > 0:
            experts[f"experts of the {branch}"] = moe.experts
    heads = {"attention heads": text.num_heads, "key/value heads": text.num_kv_heads}
    if any(not text.is_moe_layer(i) for i in range(text.num_layers)):
        heads["hidden units of a dense layer"] = text.intermediate_size
    return {
        "tp": heads,
        "expert": experts,
    }


def text_plan(text: TextConfig) -> dict[str, list[str]]:
    """Module names of decoder and head by style."""
    plan: dict[str, list[str]] = {
        "embedding": ["text.embed"],
        "head": ["lm_head"],
        "sequence": ["text.norm"],
        "pair": [],
        "pair_of_patches": [],
        "column": [],
        "row": [],
        "partial": [],
    }
    for i in range(text.num_layers):
        layer = f"text.layers.{i}"
        plan["sequence"] += [f"{layer}.attn_norm", f"{layer}.mlp_norm"]
        plan["pair"].append(f"{layer}.attn")
        plan["column"] += [f"{layer}.attn.{name}" for name in "qkv"]
        plan["partial"] += [f"{layer}.attn.q_norm", f"{layer}.attn.k_norm"]
        plan["row"].append(f"{layer}.attn.o")
        if not text.is_moe_layer(i):
            plan["pair"].append(f"{layer}.mlp")
            plan["column"] += [f"{layer}.mlp.gate", f"{layer}.mlp.up"]
            plan["row"].append(f"{layer}.mlp.down")
    return plan


def tensor_plan(config: Qwen3VLConfig, ranks: int) -> dict[str, list[str]]:
    """Module names by style. The vision tower is split where its heads divide, else replicated."""
    plan, vision = text_plan(config.text), config.vision
    if vision.num_heads % ranks == 0 and vision.intermediate_size % ranks == 0:
        for i in range(vision.depth):
            block = f"vision.blocks.{i}"
            plan["pair_of_patches"] += [f"{block}.attn", f"{block}.mlp"]
            plan["column"] += [f"{block}.attn.{name}" for name in "qkv"] + [f"{block}.mlp.up"]
            plan["row"] += [f"{block}.attn.o", f"{block}.mlp.down"]
        levels = [f"vision.deepstack_mergers.{j}" for j in range(len(vision.deepstack_layers))]
        mergers = ("vision.merger", *levels) if vision.projector_moe.experts <= 0 else ()
        for merger in mergers:
            plan["pair_of_patches"].append(merger)
            plan["partial"].append(f"{merger}.norm")
            plan["column"].append(f"{merger}.fc1")
            plan["row"].append(f"{merger}.fc2")
    return plan


def pipeline_units(config: Qwen3VLConfig, length: int) -> list[Unit]:
    """What a pipeline can be cut between, in order; costs are forward operations for a row of
    `length` tokens."""
    text, vision = config.text, config.vision
    side = round(VISUAL_TOKENS**0.5) * vision.merge_size
    first = Unit(("vision", "text.embed"), flops.visual(vision, 1, side, side), 0)
    return cut(text, length, first, len(vision.deepstack_layers))


def cut(text: TextConfig, length: int, first: Unit, levels: int) -> list[Unit]:
    """Units of a model with such a decoder.

    Args:
        first: what comes before the layers; its cost that of a picture of `VISUAL_TOKENS`.
        levels: added behind as many of the first layers.
    """
    pictures = VISUAL_SHARE * length / VISUAL_TOKENS
    lookup = 2.0 * text.hidden_size * length
    first = replace(first, cost=pictures * first.cost + lookup)
    layers = [
        Unit((f"text.layers.{i}",), flops.layer(text, i, length), max(levels - i, 0))
        for i in range(text.num_layers)
    ]
    leave = Unit(("text.norm", "lm_head"), flops.head(text, length), 0)
    return [first, *layers, leave]
