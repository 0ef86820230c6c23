"""Dimensions of OmniMoE, and the flavours that have a name.

The towers have the published dimensions of SigLIP2 (google/siglip2-*) and Qwen3 (Qwen/Qwen3-*). The
projector between them is the section `[projector]` of a run.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import MoE, MoEConfig, chosen_layers
from titan_vlm.models.projector import Projector, is_pooled
from titan_vlm.models.qwen3_vl.config import TextConfig, interleaves
from titan_vlm.models.qwen3_vl.experts import check_experts, check_projector, decoder_with_experts

T = TypeVar("T")
FINAL, POOLED = "final", "pooled"  # scales of the vision tower, besides its blocks


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP2. `num_positions` is the size of the square table of learned positions.

    naflex      any aspect ratio, positions resampled bilinearly; else squares of one size, whose
                positions are resampled bicubically to other sizes
    merge_size  the side of the squares of patches that lie behind one another (`Projector`)
    pooled      whether there is a pooling head, and a scale of that name
    """

    depth: int = 12
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_heads: int = 12
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 1
    num_positions: int = 256
    naflex: bool = True
    norm_eps: float = 1e-6
    merge_size: int = 2
    pooled: bool = True
    moe: MoEConfig = field(default_factory=MoEConfig)

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
class OmniConfig:
    """The whole model. Token ids are those of its tokenizer."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: Projector = field(default_factory=Projector)
    projector_moe: MoEConfig = field(default_factory=MoEConfig)
    tie_embeddings: bool = True
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self) -> None:
        check(self)

    @property
    def levels(self) -> tuple[tuple[str, int], ...]:
        """(scale, decoder layer) of each level."""
        pairs = (level.split(":") for level in self.projector.levels)
        return tuple((scale, int(layer)) for scale, layer in pairs)

    @property
    def queries(self) -> int:
        """Visual tokens of a frame where their number is fixed, else 0."""
        fixed = self.projector.reduction in ("resampler", "qformer")
        return self.projector.tokens if fixed else 0


_SIZES = ("hidden_size", "intermediate_size", "num_heads")
_AT_LEAST_ONE = {
    "text": (*_SIZES, "vocab_size", "num_layers", "num_kv_heads", "head_dim"),
    "vision": (*_SIZES, "depth", "in_channels", "patch_size", "num_positions"),
}


def check(config: OmniConfig) -> None:
    """Refuse dimensions that cannot be built.

    Raises:
        ConfigError: names the key.
    """
    text, vision, projector = config.text, config.vision, config.projector
    for part, names in _AT_LEAST_ONE.items():
        for name in names:
            if getattr(getattr(config, part), name) < 1:
                raise ConfigError(
                    f"model dimensions: {part} {name} must be at least 1, got "
                    f"{getattr(getattr(config, part), name)}"
                )
    scales = [*map(str, range(vision.depth)), FINAL, *([POOLED] if vision.pooled else [])]
    for level in projector.levels:
        scale, _, layer = level.partition(":")
        if scale not in scales:
            raise ConfigError(
                f'projector.levels: no scale "{scale}"; this vision tower has the blocks 0 to '
                f"{vision.depth - 1}, {FINAL} and {POOLED}"
            )
        if not layer.isdecimal() or int(layer) >= text.num_layers:
            raise ConfigError(
                f'projector.levels: "{level}": expected scale:layer, as "{scale}:0", with one of '
                f"the decoder's layers 0 to {text.num_layers - 1}"
            )
    if projector.depth > len(projector.levels):
        raise ConfigError(
            f"projector.depth = {projector.depth}: there are {len(projector.levels)} levels"
        )
    rules = [
        (
            vision.num_heads > 0 and vision.hidden_size % vision.num_heads == 0,
            f"vision hidden_size {vision.hidden_size} is no multiple of {vision.num_heads} heads",
        ),
        (
            round(vision.num_positions**0.5) ** 2 == vision.num_positions,
            f"vision num_positions {vision.num_positions} is no square",
        ),
        (
            text.num_kv_heads > 0 and text.num_heads % text.num_kv_heads == 0,
            f"{text.num_heads} attention heads, no multiple of {text.num_kv_heads} key/value heads",
        ),
        (
            2 * sum(text.mrope_section) == text.head_dim,
            f"mrope_section {list(text.mrope_section)} must sum to head_dim / 2 = "
            f"{text.head_dim / 2:g}",
        ),
        (
            interleaves(text.mrope_section),
            f"mrope_section {list(text.mrope_section)} cannot be interleaved t h w t h w ...",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(f"model dimensions: {message}")


def siglip2(size: str, patch: int = 16, resolution: int = 0) -> VisionConfig:
    """A published vision tower; with a `resolution` that of fixed squares, else NaFlex."""
    width, mlp, depth, heads = {
        "base": (768, 3072, 12, 12),
        "large": (1024, 4096, 24, 16),
        "so400m": (1152, 4304, 27, 16),
    }[size]
    positions = (resolution // patch) ** 2 if resolution else 256
    return VisionConfig(depth, width, mlp, heads, 3, patch, 1, positions, naflex=not resolution)


def qwen3(hidden: int, layers: int, heads: int, mlp: int) -> TextConfig:
    """A published dense decoder."""
    return TextConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        intermediate_size=mlp,
        rope_theta=1_000_000.0,
        max_positions=40960,
    )


QWEN3 = {
    "0.6b": qwen3(1024, 28, 16, 3072),
    "1.7b": qwen3(2048, 28, 16, 6144),
    "4b": qwen3(2560, 36, 32, 9728),
    "8b": qwen3(4096, 36, 32, 12288),
    "14b": qwen3(5120, 40, 40, 17408),
    "32b": qwen3(5120, 64, 64, 25600),
}
TIED = ("0.6b", "1.7b", "4b")
SIGLIP2 = {
    "base": siglip2("base"),
    "large": siglip2("large", resolution=256),
    "so400m": siglip2("so400m"),
    "base-224": siglip2("base", resolution=224),
    "so400m-384": siglip2("so400m", 14, 384),
}

# Small enough for a laptop, yet no two dimensions equal that a transposition could hide behind.
_DEBUG = OmniConfig(
    TextConfig(
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
    ),
    VisionConfig(depth=4, hidden_size=96, intermediate_size=256, num_heads=4, num_positions=64),
    tie_embeddings=False,
)

# "debug", or a vision tower and a decoder: "so400m+8b".
FLAVORS = {"debug": _DEBUG} | {
    f"{vision}+{text}": OmniConfig(QWEN3[text], SIGLIP2[vision], tie_embeddings=text in TIED)
    for vision in SIGLIP2
    for text in QWEN3
}


def with_settings(config: OmniConfig, moe: MoE, projector: Projector) -> OmniConfig:
    """The same towers, joined as `[projector]` says, with experts as `[moe]` says. What the two
    leave as it is by default is as `config` has it, which may be a Hugging Face directory's.

    Raises:
        ConfigError: as `check`; or settings that do not go together; names the key.
    """
    projector = _over(config.projector, projector)
    moe = MoE(
        _over(config.text.moe, moe.text),
        _over(config.vision.moe, moe.vision),
        _over(config.projector_moe, moe.projector),
    )
    queries = projector.reduction in ("resampler", "qformer")
    if queries and projector.positions != "1d":
        raise ConfigError(
            f'projector.positions: expected "1d" with reduction = "{projector.reduction}", whose '
            f'tokens have no place in the picture, got "{projector.positions}"'
        )
    check_experts("vision", moe.vision, config.vision.depth, moe.vision.experts, moe.vision.top_k)
    check_projector(moe.projector, 1 + len(projector.levels))
    vision = replace(
        config.vision,
        merge_size=2 if projector.reduction == "merge" else 1,
        pooled=any(map(is_pooled, projector.levels)),
        moe=moe.vision,
    )
    text = decoder_with_experts(config.text, moe.text)
    return replace(
        config, text=text, vision=vision, projector=projector, projector_moe=moe.projector
    )


def _over(own: T, given: T) -> T:
    """`own`, but for what `given` does not have as by default."""
    default = type(given)()
    named = {f.name: getattr(given, f.name) for f in fields(given)}
    return replace(own, **{k: v for k, v in named.items() if v != getattr(default, k)})


def visual(config: OmniConfig) -> dict[str, Any]:
    """How pictures become patches and tokens."""
    names = ("patch_size", "merge_size", "temporal_patch_size")
    geometry = {name: getattr(config.vision, name) for name in names}
    positions = config.projector.positions
    return geometry | {
        "square": not config.vision.naflex,
        "tokens": config.queries,
        "positions": positions,
    }
