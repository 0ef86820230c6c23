"""How many floating-point operations a batch costs; counted as for Qwen3-VL (its flops.py)."""

from titan_vlm.models.omni.config import POOLED, OmniConfig
from titan_vlm.models.qwen3_vl.flops import (
    FORWARD_AND_BACKWARD,
    document,
    moe_weights,
    tower_weights,
)


def flops(config: OmniConfig, doc_lens: list[int], grids: list[tuple[int, int, int]]) -> float:
    """Operations of one forward and backward pass.

    Args:
        doc_lens: lengths of the documents in tokens; attention does not cross them.
        grids: (t, h, w) in patches of each image or video.
    """
    text = sum(document(config.text, length) for length in doc_lens)
    pictures = sum(visual(config, *grid) for grid in grids)
    return float(FORWARD_AND_BACKWARD * (text + pictures))


def visual(config: OmniConfig, frames: int, height: int, width: int) -> float:
    """Forward operations of tower and projector for an image or video of `height` x `width`
    patches."""
    return frames * (_tower(config, height * width) + _projector(config, height * width))


def _tower(config: OmniConfig, patches: int) -> float:
    """Of one frame."""
    vision = config.vision
    size, mlp, moe = (
        vision.hidden_size,
        2 * vision.hidden_size * vision.intermediate_size,
        vision.moe,
    )
    sparse = len(vision.moe_layers)
    mlps = (vision.depth - sparse) * mlp
    if sparse:
        mlps += tower_weights(size, sparse, moe)
    per_patch = vision.patch_dim * size + vision.depth * 4 * size**2 + mlps
    operations = 2 * per_patch * patches + vision.depth * 4 * patches**2 * size
    if vision.pooled:  # one query; its keys and values are of all patches
        operations += 2 * (2 * size**2 * patches + 2 * size**2 + mlp) + 4 * patches * size
    return operations


def _projector(config: OmniConfig, patches: int) -> float:
    """Of one frame."""
    size, queries = config.vision.hidden_size, config.queries
    depth = config.projector.depth
    levels = config.levels if depth < 0 else config.levels[:depth]
    scales = ["final", *(scale for scale, _ in levels)]
    operations = 0.0
    for scale in scales:
        if scale == POOLED:
            operations += 2 * _bridge(config, size)
            continue
        if queries:
            operations += _queries(config, patches)
        tokens = queries or patches / config.vision.merge_size**2
        operations += 2 * tokens * _bridge(config, size * config.vision.merge_size**2)
    return operations


def _bridge(config: OmniConfig, merged: int) -> float:
    """Weights that a token passes."""
    moe, out = config.projector_moe, config.text.hidden_size
    if moe.experts > 0:
        return moe_weights(merged, out, moe.experts, moe.top_k, moe.expert_width, moe)
    return merged**2 + merged * out


def _queries(config: OmniConfig, patches: int) -> float:
    """Resampler or Q-Former on one frame: attention and MLPs of the queries, keys and values of
    what they look at."""
    size, queries = config.vision.hidden_size, config.queries
    layers, mlp = config.projector.layers, 8 * size**2

    def look(seen: int) -> float:
        return 2 * (2 * queries + 2 * seen) * size**2 + 4 * queries * seen * size

    if config.projector.reduction == "resampler":
        return layers * (look(patches + queries) + 2 * queries * mlp)
    looking = (layers + 1) // 2
    return layers * (look(queries) + 2 * queries * mlp) + looking * look(patches)
