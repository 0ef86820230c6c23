"""The vision tower of OmniMoE: SigLIP2 (arXiv 2502.14786), with experts where they are wanted.

    patches [N, C] -> embed -> + resampled positions -> blocks -> norm -> "final"  [N, D]
                                              | chosen blocks       |
                                              +-> "3", "7" [N, D]   +-> pooling -> "pooled" [I, D]

Every scale that the projector asks for comes out by its name. A picture attends to itself only, a
video frame by frame. Two variants differ in how the square table of learned positions is resampled
to a picture's grid: NaFlex bilinearly with antialiasing, the fixed resolutions bicubically (and not
at all at their own). Both are linear and separable: two small matrices, whose product with the
table is the same on every device.

Equal to transformers' `Siglip2VisionModel` and `SiglipVisionModel`, but for the padding that packed
pictures make needless.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_vlm.models.inputs import Batch
from titan_vlm.models.layers.attention import Documents, attend
from titan_vlm.models.layers.mlp import GeluMLP
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.tokens import Tokens
from titan_vlm.models.omni.config import FINAL, POOLED, VisionConfig

# N patches, I frames, D model width


class VisionTower(nn.Module):
    """See the module docstring."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embed = nn.Linear(config.patch_dim, width)
        self.pos_embed = nn.Embedding(config.num_positions, width)
        self.blocks = nn.ModuleDict({str(i): VisionBlock(config, i) for i in range(config.depth)})
        self.norm = nn.LayerNorm(width, config.norm_eps)
        if config.pooled:
            self.pooling = AttentionPooling(config)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The hidden states [N, D] behind every block by its index, the normalised last ones as
        "final", and with `config.pooled` the summary [I, D] of each frame as "pooled"."""
        frames = Documents(frame_lens(batch))
        tokens = batch.visual_tokens() if self.config.moe_layers else None
        x_ND = self.patch_embed(batch.pixels_NC.to(self.patch_embed.weight.dtype))
        x_ND = x_ND + self._positions(batch.grids, x_ND)
        scales = {}
        for name, block in self.blocks.items():
            x_ND = scales[name] = block(x_ND, frames, tokens)
        scales[FINAL] = self.norm(x_ND)
        if self.config.pooled:
            scales[POOLED] = self.pooling(scales[FINAL], frames)
        return scales

    def rows(self, scale: str, grid: tuple[int, int, int]) -> int:
        """Of a scale, those of one picture."""
        t, h, w = grid
        return t if scale == POOLED else t * h * w

    def _positions(self, grids: list[tuple[int, int, int]], like: Tensor) -> Tensor:
        """[N, D]; the table of learned positions, resampled to each frame's grid."""
        config = self.config
        exact = torch.promote_types(like.dtype, torch.float32)
        side = round(config.num_positions**0.5)
        everywhere = torch.arange(config.num_positions, device=like.device)
        table_RCD = self.pos_embed(everywhere).to(exact).unflatten(0, (side, side))
        found = [table_RCD.new_zeros(0, config.hidden_size) + 0 * table_RCD.sum()]
        for frames, height, width in grids:
            rows, columns = (
                resampling(side, size, config.naflex).to(table_RCD) for size in (height, width)
            )
            table_hwD = torch.einsum("hr,wc,rcd->hwd", rows, columns, table_RCD)
            ordered_ND = in_merge_order(table_hwD, config.merge_size)
            found += [ordered_ND] * frames
        return torch.cat(found).to(like.dtype)


def frame_lens(batch: Batch) -> list[int]:
    """Patches of each frame of all pictures and videos."""
    return [h * w for t, h, w in batch.grids for _ in range(t)]


def in_merge_order(x_hwD: Tensor, merge: int) -> Tensor:
    """[h, w, D] -> [h * w, D], the patches of a merge x merge square behind one another."""
    blocks = x_hwD.unflatten(1, (-1, merge)).unflatten(0, (-1, merge))
    return blocks.transpose(1, 2).flatten(0, 3)


@lru_cache(maxsize=1024)
def resampling(source: int, target: int, antialias: bool) -> Tensor:
    """float64 [target, source]: what `F.interpolate` makes of a line of `source` numbers, bilinear
    with antialiasing or else bicubic."""
    # Resampled along the first side only: each column of the result belongs to one number.
    eye = torch.eye(source, dtype=torch.float64)[None, None]
    mode = {"mode": "bilinear", "antialias": True} if antialias else {"mode": "bicubic"}
    return F.interpolate(eye, size=(target, source), align_corners=False, **mode)[0, 0]


class VisionBlock(nn.Module):
    """Pre-norm transformer block with full attention inside each frame, with experts or dense."""

    def __init__(self, config: VisionConfig, index: int):
        super().__init__()
        width, moe = config.hidden_size, config.moe
        self.norm1 = nn.LayerNorm(width, config.norm_eps)
        self.attn = VisionAttention(width, config.head_dim)
        self.norm2 = nn.LayerNorm(width, config.norm_eps)
        if index in config.moe_layers:
            name = f"vision.blocks.{index}"
            self.moe = MoE(width, moe.expert_width, moe.experts, moe.top_k, moe, name=name)
        else:
            self.mlp = GeluMLP(width, config.intermediate_size)

    def forward(self, x_ND: Tensor, frames: Documents, tokens: Tokens | None) -> Tensor:
        x_ND = x_ND + self.attn(self.norm1(x_ND), frames)
        normed_ND = self.norm2(x_ND)
        return x_ND + (self.moe(normed_ND, tokens) if hasattr(self, "moe") else self.mlp(normed_ND))


class VisionAttention(nn.Module):
    """Bidirectional attention. `frames`: a document each."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x_ND: Tensor, frames: Documents) -> Tensor:
        heads = (-1, self.head_dim)
        q, k, v = (linear(x_ND).unflatten(-1, heads) for linear in (self.q, self.k, self.v))
        return self.o(attend(q, k, v, frames, causal=False).flatten(1))


class AttentionPooling(nn.Module):
    """One learned query looks at all patches of a frame (Zhai et al. 2022, arXiv 2106.04560)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.probe = nn.Embedding(1, width)
        self.attn = CrossAttention(width, width, config.head_dim)
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.mlp = GeluMLP(width, config.intermediate_size)

    def forward(self, x_ND: Tensor, frames: Documents) -> Tensor:
        ones = Documents([1] * len(frames.lens))
        probe_ID = self.probe(torch.zeros(len(ones.lens), dtype=torch.long, device=x_ND.device))
        x_ID = self.attn(probe_ID, x_ND, ones, frames)
        return x_ID + self.mlp(self.norm(x_ID))


class CrossAttention(nn.Module):
    """Queries of one kind look at tokens of another, document by document.

    Args:
        width: of the queries and the output.
        other: width of the tokens that are looked at.
    """

    def __init__(self, width: int, other: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(other, width)
        self.v = nn.Linear(other, width)
        self.o = nn.Linear(width, width)

    def forward(self, x_QD: Tensor, seen_ND: Tensor, queries: Documents, keys: Documents) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.q(x_QD).unflatten(-1, heads)
        k, v = (linear(seen_ND).unflatten(-1, heads) for linear in (self.k, self.v))
        return self.o(attend(q, k, v, queries, causal=False, keys=keys).flatten(1))
