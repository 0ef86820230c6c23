"""What may be split among how many ranks, said without knowing how."""

from titan_vlm.models.qwen3_vl import flops
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig
from titan_vlm.models.units import Unit

# What a pipeline expects of its rows: half of the tokens are visual, 256 of them a picture.
_VISUAL_SHARE, _VISUAL_TOKENS = 0.5, 256


def divisible(config: Qwen3VLConfig) -> dict[str, dict[str, int]]:
    """For each view of the mesh that splits the model: what it splits, into how many at most."""
    text = config.text
    has_experts = any(text.is_moe_layer(i) for i in range(text.num_layers))
    experts = {"experts of a layer": text.num_experts if has_experts else 1}
    for branch, moe in (("vision", config.vision.moe), ("projector", config.vision.projector_moe)):
        if moe.experts > 0:
            experts[f"experts of the {branch}"] = moe.experts
    heads = {"attention heads": text.num_heads, "key/value heads": text.num_kv_heads}
    if any(not text.is_moe_layer(i) for i in range(text.num_layers)):
        heads["hidden units of a dense layer"] = text.intermediate_size
    return {
        "tp": heads,
        "expert": experts,
    }


def tensor_plan(config: Qwen3VLConfig, ranks: int) -> dict[str, list[str]]:
    """Module names by style. The vision tower is split where its heads divide, else replicated."""
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
    for i in range(config.text.num_layers):
        layer = f"text.layers.{i}"
        plan["sequence"] += [f"{layer}.attn_norm", f"{layer}.mlp_norm"]
        plan["pair"].append(f"{layer}.attn")
        plan["column"] += [f"{layer}.attn.{name}" for name in "qkv"]
        plan["partial"] += [f"{layer}.attn.q_norm", f"{layer}.attn.k_norm"]
        plan["row"].append(f"{layer}.attn.o")
        if not config.text.is_moe_layer(i):
            plan["pair"].append(f"{layer}.mlp")
            plan["column"] += [f"{layer}.mlp.gate", f"{layer}.mlp.up"]
            plan["row"].append(f"{layer}.mlp.down")

    vision = config.vision
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
    side = round(_VISUAL_TOKENS**0.5) * vision.merge_size
    pictures = _VISUAL_SHARE * length / _VISUAL_TOKENS
    lookup = 2.0 * text.hidden_size * length
    enter = pictures * flops.visual(vision, 1, side, side) + lookup
    levels = len(vision.deepstack_layers)
    layers = [
        Unit((f"text.layers.{i}",), flops.layer(text, i, length), max(levels - i, 0))
        for i in range(text.num_layers)
    ]
    leave = Unit(("text.norm", "lm_head"), flops.head(text, length), 0)
    return [Unit(("vision", "text.embed"), enter, 0), *layers, leave]
