"""The vision tower of Qwen3-VL: patches of any number of images in, text-width features out.

    patches [N, C*t*p*p] -> embed -> + interpolated positions -> blocks -> merger -> [M, D]
                                                        | blocks 8, 16, 24
                                                        +-> DeepStack mergers -> 3 x [M, D]

Patches arrive in merge order (the four patches of a 2 x 2 square are neighbours), so that merging
is a reshape: M = N / 4. A frame attends to itself only. An empty batch (N = 0) goes through every
module, so that a rank without images takes part in whatever its parameters' sharding asks for.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_vlm.models.inputs import Batch
from titan_vlm.models.layers.attention import Documents, attend
from titan_vlm.models.layers.mlp import GeluMLP
from titan_vlm.models.layers.rope import frequencies, rotate
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.tokens import Tokens
from titan_vlm.models.qwen3_vl.config import VisionConfig

Grid = tuple[int, int, int]
NORM_EPS = 1e-6


class VisionTower(nn.Module):
    """See the module docstring."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_dim, config.hidden_size)
        self.pos_embed = nn.Embedding(config.num_positions, config.hidden_size)
        self.blocks = nn.ModuleDict({str(i): VisionBlock(config, i) for i in range(config.depth)})
        self.merger = PatchMerger(config, norm_after_merge=False, name="vision.merger")
        self.deepstack_mergers = nn.ModuleDict(
            {
                str(j): PatchMerger(config, True, f"vision.deepstack_mergers.{j}")
                for j in range(len(config.deepstack_layers))
            }
        )

    def forward(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Features [M, D] and the DeepStack features, one [M, D] for each early text layer."""
        pixels_NC, grids = batch.pixels_NC, batch.grids
        patches = batch.visual_tokens() if self.config.moe_layers else None
        merged = None
        if self.config.projector_moe.experts > 0:
            merged = batch.visual_tokens(self.config.merge_size**2)
        x_ND = self.patch_embed(pixels_NC.to(self.patch_embed.weight.dtype))
        exact = torch.promote_types(x_ND.dtype, torch.float32)
        geometry = [_geometry(h, w, self.config, exact) for _, h, w in grids]
        x_ND = x_ND + self._positions(geometry, grids, x_ND)
        angles = _gather([g[2] for g in geometry], grids, (0, self.config.head_dim // 2), x_ND)
        cos, sin = angles.cos(), angles.sin()
        frames = Documents([h * w for t, h, w in grids for _ in range(t)])

        deepstack = []
        for name, block in self.blocks.items():
            x_ND = block(x_ND, cos, sin, frames, patches)
            if int(name) in self.config.deepstack_layers:
                j = self.config.deepstack_layers.index(int(name))
                deepstack.append(self.deepstack_mergers[str(j)](x_ND, merged))
        return self.merger(x_ND, merged), deepstack

    def _positions(self, geometry: list, grids: list[Grid], like: Tensor) -> Tensor:
        """The learned square table of positions, resampled bilinearly to each image's grid."""
        corners_N4 = _gather([g[0] for g in geometry], grids, (0, 4), like).long()
        weights_N4 = _gather([g[1] for g in geometry], grids, (0, 4), like)
        table = self.pos_embed(corners_N4)
        return (table * weights_N4.unsqueeze(-1)).sum(1).to(like.dtype)


def _gather(parts: list[Tensor], grids: list[Grid], empty: tuple, like: Tensor) -> Tensor:
    """Per-frame tables of all images as one tensor on the device, repeated for a video's frames."""
    frames = [part for part, (t, _, _) in zip(parts, grids, strict=True) for _ in range(t)]
    table = torch.cat(frames) if frames else torch.empty(empty)
    return table.to(like.device, non_blocking=True)


@lru_cache(maxsize=1024)
def _geometry(
    h: int, w: int, config: VisionConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What a frame of h x w patches needs, on the host, in merge order.

    Returns:
        [h*w, 4] indices of the four table entries around each patch, [h*w, 4] their bilinear
        weights (corners aligned), and [h*w, head_dim / 2] rotary angles.
    """
    merge, side = config.merge_size, round(config.num_positions**0.5)
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    row, col = (
        x.reshape(h // merge, merge, w // merge, merge).transpose(1, 2).flatten()
        for x in (row, col)
    )

    def around(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
        place = index.to(dtype) * (side - 1) / max(size - 1, 1)
        low = place.floor().long()
        taps = torch.stack((low, (low + 1).clamp(max=side - 1)), -1)
        return taps, torch.stack((1 - (place - low), place - low), -1)

    (row_taps, row_weights), (col_taps, col_weights) = around(row, h), around(col, w)
    corners = (row_taps.unsqueeze(2) * side + col_taps.unsqueeze(1)).flatten(1)
    weights = (row_weights.unsqueeze(2) * col_weights.unsqueeze(1)).flatten(1)
    inverse = frequencies(config.head_dim // 2, config.rope_theta, dtype, torch.device("cpu"))
    angles = torch.cat((row.to(dtype).unsqueeze(1) * inverse, col.unsqueeze(1) * inverse), -1)
    return corners, weights, angles


class VisionBlock(nn.Module):
    """Pre-norm transformer block with full attention inside each frame, with experts or dense."""

    def __init__(self, config: VisionConfig, index: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config.hidden_size, config.head_dim)
        moe = config.moe
        if index in config.moe_layers:
            self.moe = MoE(
                config.hidden_size,
                moe.expert_width,
                moe.experts,
                moe.top_k,
                moe,
                name=f"vision.blocks.{index}",
            )
        else:
            self.mlp = GeluMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_ND: Tensor, cos: Tensor, sin: Tensor, frames: Documents, tokens: Tokens | None
    ) -> Tensor:
        x_ND = x_ND + self.attn(self.norm1(x_ND), cos, sin, frames)
        normed_ND = self.norm2(x_ND)
        return x_ND + (self.moe(normed_ND, tokens) if hasattr(self, "moe") else self.mlp(normed_ND))


class VisionAttention(nn.Module):
    """Bidirectional attention with 2D rotary positions. `frames`: a document each."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x_ND: Tensor, cos: Tensor, sin: Tensor, frames: Documents) -> Tensor:
        heads = (-1, self.head_dim)
        q, k, v = (linear(x_ND).unflatten(-1, heads) for linear in (self.q, self.k, self.v))
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, frames, causal=False)
        return self.o(out.flatten(1))


class PatchMerger(nn.Module):
    """Four neighbouring patches become one feature of the text width; dense, or by experts."""

    def __init__(self, config: VisionConfig, norm_after_merge: bool, name: str):
        super().__init__()
        self.merged = config.hidden_size * config.merge_size**2
        self.norm_after_merge = norm_after_merge
        self.norm = nn.LayerNorm(self.merged if norm_after_merge else config.hidden_size, NORM_EPS)
        moe, out = config.projector_moe, config.out_hidden_size
        if moe.experts > 0:
            self.moe = MoE(
                self.merged, moe.expert_width, moe.experts, moe.top_k, moe, out=out, name=name
            )
        else:
            self.fc1 = nn.Linear(self.merged, self.merged)
            self.fc2 = nn.Linear(self.merged, out)

    def forward(self, x_ND: Tensor, tokens: Tokens | None = None) -> Tensor:
        if self.norm_after_merge:
            x = self.norm(x_ND.reshape(-1, self.merged))
        else:
            x = self.norm(x_ND).reshape(-1, self.merged)
        return self.moe(x, tokens) if hasattr(self, "moe") else self.fc2(F.gelu(self.fc1(x)))
