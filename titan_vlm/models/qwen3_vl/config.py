"""Dimensions of Qwen3-VL and Qwen3-VL-MoE, and the flavours that have a name.

The published dimensions are those of the `config.json` files of Qwen/Qwen3-VL-*-Instruct.
`from_hf` and `to_hf` translate between these dataclasses and such a file.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from titan_vlm.errors import ConfigError
from titan_vlm.models.config_json import require
from titan_vlm.models.moe.config import MoEConfig, chosen_layers


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `num_experts == 0` makes every block dense."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_layers: int = 48
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 128
    rope_theta: float = 5_000_000.0
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    norm_eps: float = 1e-6
    max_positions: int = 262144
    initializer_range: float = 0.02
    attention_bias: bool = False
    attention_dropout: float = 0.0  # in training
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    moe: MoEConfig = field(default_factory=MoEConfig, hash=False)

    def is_moe_layer(self, i: int) -> bool:
        """Whether block `i` holds experts (the rule of Qwen3's configuration)."""
        return (
            self.num_experts > 0
            and i not in self.mlp_only_layers
            and (i + 1) % self.decoder_sparse_step == 0
        )


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; `deepstack_layers` are the blocks whose output feeds early text layers."""

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    out_hidden_size: int = 2048
    num_positions: int = 2304
    deepstack_layers: tuple[int, ...] = (8, 16, 24)
    rope_theta: float = 10_000.0
    # Out of the hash, by which geometry is cached: they hold lists.
    moe: MoEConfig = field(default_factory=MoEConfig, hash=False)
    projector_moe: MoEConfig = field(default_factory=MoEConfig, hash=False)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The blocks that hold experts."""
        return chosen_layers(self.moe, self.depth) if self.moe.experts > 0 else ()

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Qwen3VLConfig:
    """The whole model. Token ids are those of its tokenizer (`with_token_ids`)."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    tie_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self) -> None:
        check(self)


def check(config: Qwen3VLConfig) -> None:
    """Refuse dimensions that cannot be built, naming them.

    Raises:
        ConfigError: a dimension contradicts another.
    """
    text, vision = config.text, config.vision
    rules = [
        (
            text.num_kv_heads > 0 and text.num_heads % text.num_kv_heads == 0,
            f"num_attention_heads {text.num_heads} is no multiple of "
            f"num_key_value_heads {text.num_kv_heads}",
        ),
        (
            2 * sum(text.mrope_section) == text.head_dim,
            f"mrope_section {list(text.mrope_section)} must sum to head_dim / 2 = "
            f"{text.head_dim / 2:g}",
        ),
        (
            interleaves(text.mrope_section),
            f"mrope_section {list(text.mrope_section)} cannot be interleaved t h w t h w ...: "
            "expected three numbers, height and width at most every third of "
            f"{text.head_dim // 2} frequencies, e.g. {even_sections(text.head_dim // 2)}",
        ),
        (
            text.decoder_sparse_step >= 1,
            f"decoder_sparse_step {text.decoder_sparse_step} must be at least 1",
        ),
        (
            text.num_experts == 0 or text.moe_intermediate_size >= 1,
            f"moe_intermediate_size {text.moe_intermediate_size} must be at least 1 with "
            f"num_experts {text.num_experts}",
        ),
        (
            vision.out_hidden_size == text.hidden_size,
            f"vision out_hidden_size {vision.out_hidden_size} differs from the text "
            f"hidden_size {text.hidden_size}",
        ),
        (
            vision.num_heads > 0 and vision.hidden_size % (4 * vision.num_heads) == 0,
            f"vision hidden_size {vision.hidden_size} must be a multiple of 4 x num_heads "
            f"{vision.num_heads}: rotary positions split a head in four",
        ),
        (
            round(vision.num_positions**0.5) ** 2 == vision.num_positions,
            f"vision num_position_embeddings {vision.num_positions} is no square",
        ),
        (
            all(0 <= i < vision.depth for i in vision.deepstack_layers),
            f"deepstack_visual_indexes {list(vision.deepstack_layers)} leave the vision "
            f"tower's {vision.depth} blocks",
        ),
        (
            len(vision.deepstack_layers) <= text.num_layers,
            f"{len(vision.deepstack_layers)} DeepStack features need as many text layers; "
            f"there are {text.num_layers}",
        ),
        (
            text.num_experts == 0 or 0 < text.num_experts_per_tok <= text.num_experts,
            f"num_experts_per_tok {text.num_experts_per_tok} must lie in 1..num_experts "
            f"{text.num_experts}",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(f"model dimensions: {message}")


def interleaves(sections: tuple[int, ...]) -> bool:
    """Whether every axis finds as many places in t h w t h w ... t t as its section counts."""
    if len(sections) != 3 or min(sections) < 0:
        return False
    return all(axis + 3 * (sections[axis] - 1) < sum(sections) for axis in (1, 2))


def even_sections(frequencies: int) -> list[int]:
    """As many frequencies for each of time, height and width; what is left, for time."""
    third = frequencies // 3
    return [frequencies - 2 * third, third, third]


_VISION_SMALL = VisionConfig(
    depth=24, hidden_size=1024, intermediate_size=4096, deepstack_layers=(5, 11, 17)
)


def _dense(
    vision: VisionConfig, hidden: int, layers: int, heads: int, mlp: int, tie: bool
) -> Qwen3VLConfig:
    text = TextConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        intermediate_size=mlp,
    )
    return Qwen3VLConfig(text, replace(vision, out_hidden_size=hidden), tie_embeddings=tie)


def _moe(hidden: int, layers: int, heads: int, mlp: int, expert_mlp: int) -> Qwen3VLConfig:
    text = TextConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=mlp,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=expert_mlp,
    )
    return Qwen3VLConfig(text, VisionConfig(out_hidden_size=hidden))


# Small enough for a laptop, yet no two dimensions equal that a transposition could hide behind.
_DEBUG_TEXT = TextConfig(
    vocab_size=640,
    hidden_size=128,
    intermediate_size=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope_theta=10_000.0,
    mrope_section=(6, 5, 5),
    max_positions=4096,
)
_DEBUG_VISION = VisionConfig(
    depth=4,
    hidden_size=96,
    intermediate_size=256,
    num_heads=4,
    out_hidden_size=128,
    num_positions=256,
    deepstack_layers=(1, 2),
)

FLAVORS: dict[str, Qwen3VLConfig] = {
    "debug": Qwen3VLConfig(_DEBUG_TEXT, _DEBUG_VISION, tie_embeddings=True),
    "debug_moe": Qwen3VLConfig(
        replace(
            _DEBUG_TEXT,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=160,
            mlp_only_layers=(0,),
        ),
        _DEBUG_VISION,
    ),
    "2b": _dense(_VISION_SMALL, 2048, 28, 16, 6144, tie=True),
    "4b": _dense(_VISION_SMALL, 2560, 36, 32, 9728, tie=True),
    "8b": _dense(VisionConfig(), 4096, 36, 32, 12288, tie=False),
    "32b": _dense(VisionConfig(), 5120, 64, 64, 25600, tie=False),
    "30b-a3b": _moe(2048, 48, 32, 6144, 768),
    "235b-a22b": _moe(4096, 94, 64, 12288, 1536),
}


def with_token_ids(config: Any, ids: "TokenIds", vocab: int) -> Any:
    """The same dimensions, with the special token ids of the tokenizer in use. For any family whose
    configuration has them under these names.

    `vocab` is the tokenizer's size, which the embedding must hold.

    Raises:
        ConfigError: the tokenizer has more tokens than the model has embeddings.
    """
    if vocab > config.text.vocab_size:
        raise ConfigError(
            f"data.tokenizer has {vocab} tokens but the model's vocabulary holds "
            f"{config.text.vocab_size}; use the tokenizer that belongs to the model"
        )
    return replace(
        config,
        image_token_id=ids.image,
        video_token_id=ids.video,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
    )


def visual(config: Qwen3VLConfig) -> dict[str, int]:
    """The geometry of pictures."""
    names = ("patch_size", "merge_size", "temporal_patch_size")
    return {name: getattr(config.vision, name) for name in names}


class TokenIds(Protocol):
    """Ids of the tokens that stand for, and surround, pictures."""

    image: int
    video: int
    vision_start: int
    vision_end: int


def from_hf(hf: dict) -> Qwen3VLConfig:
    """Dimensions from the content of a Hugging Face `config.json`.

    Reads the files of transformers 4 (`rope_theta` and `rope_scaling`) and 5
    (`rope_parameters`).

    Raises:
        ConfigError: another architecture, a missing key, or a feature this model lacks.
    """
    kind = hf.get("model_type")
    if kind not in ("qwen3_vl", "qwen3_vl_moe"):
        raise ConfigError(f"config.json: model_type {kind!r}; expected qwen3_vl or qwen3_vl_moe")
    moe = kind == "qwen3_vl_moe"
    try:
        t, v = hf["text_config"], hf["vision_config"]
        rope = t.get("rope_parameters") or {
            **(t.get("rope_scaling") or {}),
            "rope_theta": t["rope_theta"],
        }
        rope_type = rope.get("rope_type", "default")
        vision_rope = v.get("rope_parameters") or {}
        vision_rope_type = vision_rope.get("rope_type", "axial")
        require(
            rope_type in ("default", "mrope"),
            f"text rope_type must be default or mrope, got {rope_type}",
        )
        require(
            vision_rope_type in ("default", "axial"),  # transformers takes the first for the second
            f"vision rope_type must be axial, got {vision_rope_type}",
        )
        require(t.get("hidden_act", "silu") == "silu", "text hidden_act must be silu")
        require(
            v.get("hidden_act", "gelu_pytorch_tanh") == "gelu_pytorch_tanh",
            "vision hidden_act must be gelu_pytorch_tanh",
        )
        require(not t.get("attention_dropout"), "attention_dropout must be 0")
        require(
            rope.get("mrope_interleaved", True), "mrope_interleaved must be true, as in Qwen3-VL"
        )
        require(
            t.get("norm_topk_prob", True),
            "norm_topk_prob must be true: the weights of a token's experts sum to 1",
        )
        text = TextConfig(
            vocab_size=t["vocab_size"],
            hidden_size=t["hidden_size"],
            intermediate_size=t["intermediate_size"],
            num_layers=t["num_hidden_layers"],
            num_heads=t["num_attention_heads"],
            num_kv_heads=t["num_key_value_heads"],
            head_dim=t.get("head_dim") or t["hidden_size"] // t["num_attention_heads"],
            rope_theta=float(rope["rope_theta"]),
            mrope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
            norm_eps=t["rms_norm_eps"],
            max_positions=t["max_position_embeddings"],
            initializer_range=t.get("initializer_range", 0.02),
            attention_bias=t.get("attention_bias", False),
            num_experts=t.get("num_experts", t.get("num_local_experts", 0)) if moe else 0,
            num_experts_per_tok=t["num_experts_per_tok"] if moe else 0,
            moe_intermediate_size=t["moe_intermediate_size"] if moe else 0,
            decoder_sparse_step=t.get("decoder_sparse_step", 1) if moe else 1,
            mlp_only_layers=tuple(t.get("mlp_only_layers") or ()) if moe else (),
        )
        vision = VisionConfig(
            depth=v["depth"],
            hidden_size=v["hidden_size"],
            intermediate_size=v["intermediate_size"],
            num_heads=v["num_heads"],
            in_channels=v["in_channels"],
            patch_size=v["patch_size"],
            temporal_patch_size=v["temporal_patch_size"],
            merge_size=v["spatial_merge_size"],
            out_hidden_size=v["out_hidden_size"],
            num_positions=v["num_position_embeddings"],
            deepstack_layers=tuple(v["deepstack_visual_indexes"]),
            rope_theta=float(
                vision_rope.get("rope_theta") or v.get("rope_theta") or VisionConfig.rope_theta
            ),
        )
    except KeyError as error:
        raise ConfigError(f"config.json: key {error} is missing") from error
    return Qwen3VLConfig(
        text=text,
        vision=vision,
        tie_embeddings=hf.get("tie_word_embeddings", t.get("tie_word_embeddings", False)),
        image_token_id=hf.get("image_token_id", 151655),
        video_token_id=hf.get("video_token_id", 151656),
        vision_start_token_id=hf.get("vision_start_token_id", 151652),
        vision_end_token_id=hf.get("vision_end_token_id", 151653),
    )


def to_hf(config: Qwen3VLConfig, dtype: str = "bfloat16") -> dict:
    """The content of the `config.json` that transformers 4.57+ and 5 and vLLM read."""
    text, vision = config.text, config.vision
    moe = text.num_experts > 0
    kind = "qwen3_vl_moe" if moe else "qwen3_vl"
    rope = {"mrope_interleaved": True, "mrope_section": list(text.mrope_section)}
    text_config = {
        "model_type": f"{kind}_text",
        "dtype": dtype,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": text.norm_eps,
        "max_position_embeddings": text.max_positions,
        "initializer_range": text.initializer_range,
        "attention_bias": text.attention_bias,
        "attention_dropout": 0.0,
        "use_cache": True,
        # Both spellings: transformers 4 and vLLM read the first two, transformers 5 the third.
        "rope_theta": text.rope_theta,
        "rope_scaling": {"rope_type": "default", **rope},
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta, **rope},
        "tie_word_embeddings": config.tie_embeddings,
    }
    if moe:
        text_config |= {
            "num_experts": text.num_experts,
            "num_experts_per_tok": text.num_experts_per_tok,
            "moe_intermediate_size": text.moe_intermediate_size,
            "decoder_sparse_step": text.decoder_sparse_step,
            "mlp_only_layers": list(text.mlp_only_layers),
            "norm_topk_prob": True,
        }
    vision_config = {
        "model_type": kind,  # the published files' spelling, which every reader accepts
        "dtype": dtype,
        "depth": vision.depth,
        "hidden_size": vision.hidden_size,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": vision.intermediate_size,
        "num_heads": vision.num_heads,
        "in_channels": vision.in_channels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "spatial_merge_size": vision.merge_size,
        "out_hidden_size": vision.out_hidden_size,
        "num_position_embeddings": vision.num_positions,
        "deepstack_visual_indexes": list(vision.deepstack_layers),
    }
    if vision.rope_theta != VisionConfig.rope_theta:  # the published files leave it out
        vision_config["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.rope_theta}
    arch = "Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"
    return {
        "architectures": [arch],
        "model_type": kind,
        "dtype": dtype,
        "text_config": text_config,
        "vision_config": vision_config,
        "tie_word_embeddings": config.tie_embeddings,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
    }
