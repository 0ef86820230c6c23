"""How many floating-point operations a batch costs, for TFLOP/s and MFU.

A matrix of P parameters costs 2 P operations per token forward and 4 P backward. Counted are the
matrices a token passes (of the experts: the top-k) and attention; looking up an embedding costs
nothing. By the field's convention the whole backward pass and every token count, also where
parameters are frozen or tokens are not trained on; recomputation by activation checkpointing does
not.
"""

from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig

FORWARD_AND_BACKWARD = 3


def flops(config: Qwen3VLConfig, doc_lens: list[int], grids: list[tuple[int, int, int]]) -> float:
    """Operations of one forward and backward pass.

    Args:
        doc_lens: lengths of the documents in tokens; attention does not cross them.
        grids: (t, h, w) in patches of each image or video.
    """
    text = sum(document(config.text, length) for length in doc_lens)
    vision = sum(visual(config.vision, *grid) for grid in grids)
    return float(FORWARD_AND_BACKWARD * (text + vision))


def document(text: TextConfig, length: int) -> float:
    """Forward operations of one document through all layers and the head."""
    return sum(layer(text, i, length) for i in range(text.num_layers)) + head(text, length)


def layer(text: TextConfig, index: int, length: int) -> float:
    """Forward operations of one document through one layer."""
    width, attention = text.hidden_size, text.num_heads * text.head_dim
    matrices = 2 * width * attention + 2 * width * text.num_kv_heads * text.head_dim
    if text.is_moe_layer(index):
        asleep = index in text.moe.asleep
        experts, top_k = (0, 1) if asleep else (text.num_experts, text.num_experts_per_tok)
        hidden = text.moe_intermediate_size
        matrices += moe_weights(width, width, experts, top_k, hidden, text.moe)
    else:
        matrices += 3 * width * text.intermediate_size
    # Queries with keys, then weights with values: 2 x 2 x S^2 x heads x head_dim; a causal mask
    # halves it.
    return 2 * matrices * length + 4 * length**2 * attention / 2


def moe_weights(width: int, out: int, experts: int, top_k: int, hidden: int, moe: MoEConfig) -> int:
    """Weights that a token passes in an MoE layer."""
    shared = (2 * width + out) * moe.shared_width
    matrices = {"swiglu": 2 * width + out, "gelu": width + out}[moe.activation]
    return width * experts + top_k * matrices * hidden + shared


def tower_weights(size: int, layers: int, moe: MoEConfig) -> int:
    """Weights that a patch passes in `layers` MoE layers of a vision tower, some of them asleep."""
    asleep, hidden = len(moe.asleep), moe.expert_width
    awake = (layers - asleep) * moe_weights(size, size, moe.experts, moe.top_k, hidden, moe)
    return awake + asleep * moe_weights(size, size, 0, 1, hidden, moe)


def head(text: TextConfig, length: int) -> float:
    """Forward operations of the output head."""
    return 2.0 * text.hidden_size * text.vocab_size * length


def visual(vision: VisionConfig, frames: int, height: int, width: int) -> float:
    """Forward operations of one image or video of `height` x `width` patches."""
    size, per_frame = vision.hidden_size, height * width
    moe, sparse = vision.moe, len(vision.moe_layers)
    mlps = (vision.depth - sparse) * 2 * size * vision.intermediate_size
    if sparse:
        mlps += tower_weights(size, sparse, moe)
    per_patch = vision.patch_dim * size + vision.depth * 4 * size**2 + mlps
    merged, out = size * vision.merge_size**2, vision.out_hidden_size
    merger, moe = merged**2 + merged * out, vision.projector_moe
    if moe.experts > 0:
        merger = moe_weights(merged, out, moe.experts, moe.top_k, moe.expert_width, moe)
    per_token = merger * (1 + len(vision.deepstack_layers))
    patches = frames * per_frame
    tokens = patches / vision.merge_size**2
    scores = vision.depth * 4 * frames * per_frame**2 * size  # every frame sees itself, whole
    return 2 * (per_patch * patches + per_token * tokens) + scores
