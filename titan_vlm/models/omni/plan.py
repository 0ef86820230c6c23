"""What may be split among how many ranks, said without knowing how."""

from titan_vlm.models.omni import flops
from titan_vlm.models.omni.config import OmniConfig
from titan_vlm.models.qwen3_vl.plan import VISUAL_TOKENS, cut, divisible_parts, text_plan
from titan_vlm.models.units import Unit


def divisible(config: OmniConfig) -> dict[str, dict[str, int]]:
    """For each view of the mesh that splits the model: what it splits, into how many at most."""
    others = {"vision": config.vision.moe, "projector": config.projector_moe}
    return divisible_parts(config.text, others)


def tensor_plan(config: OmniConfig, ranks: int) -> dict[str, list[str]]:
    """Module names by style. The vision tower is split where its heads divide, else replicated, and
    so are resampler and Q-Former; of the projector the bridges are split."""
    plan, vision = text_plan(config.text), config.vision
    if vision.num_heads % ranks or vision.intermediate_size % ranks:
        return plan
    for i in range(vision.depth):
        block = f"vision.blocks.{i}"
        plan["pair_of_patches"].append(f"{block}.attn")
        plan["column"] += [f"{block}.attn.{name}" for name in "qkv"]
        plan["row"].append(f"{block}.attn.o")
        if i not in vision.moe_layers:
            plan["pair_of_patches"].append(f"{block}.mlp")
            plan["column"].append(f"{block}.mlp.up")
            plan["row"].append(f"{block}.mlp.down")
    if config.projector_moe.experts <= 0:
        levels = [f"projector.levels.{j}" for j in range(len(config.levels))]
        for scale in ("projector.final", *levels):
            plan["pair_of_patches"].append(f"{scale}.bridge")
            plan["partial"].append(f"{scale}.bridge.norm")
            plan["column"].append(f"{scale}.bridge.fc1")
            plan["row"].append(f"{scale}.bridge.fc2")
    return plan


def pipeline_units(config: OmniConfig, length: int) -> list[Unit]:
    """What a pipeline can be cut between, in order; costs are forward operations for a row of
    `length` tokens."""
    side = round(VISUAL_TOKENS**0.5) * config.vision.merge_size
    cost = flops.visual(config, 1, side, side)
    if config.queries:  # pictures of as many tokens
        cost *= VISUAL_TOKENS / config.queries
    first = Unit(("vision", "projector", "text.embed"), cost, 0)
    layers = [layer for _, layer in config.levels]
    return cut(config.text, length, first, max(layers, default=-1) + 1)
