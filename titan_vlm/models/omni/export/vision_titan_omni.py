"""The vision tower and the projector of OmniMoE.

    tower       patches [N, C] -> scales: "0", "1", ... behind each block, "final", "pooled"
    projector   "final" -> reduce -> bridge -> [M, D]   in place of the visual tokens
                others  -> reduce -> bridge -> [M, D]   added behind decoder layers

`reduce` keeps all patches, puts 2 x 2 neighbours side by side, or lets learned queries look at a
frame (Perceiver resampler, Q-Former); a bridge is a norm and an MLP, or experts.

Shapes: N patches, I frames, Q queries of all frames, M visual tokens, D widths. `frames`: patches
of each frame.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .moe_titan_omni import MoE


class VisionTower(nn.Module):
    """[N, C] -> the hidden states [N, D] behind each block by its index, the last ones normalised
    as "final", and a summary [I, D] of each frame as "pooled"."""

    def __init__(self, config: dict):
        super().__init__()
        self.config, width = config, config["hidden_size"]
        patch = config["in_channels"] * config["temporal_patch_size"] * config["patch_size"] ** 2
        self.patch_embed = nn.Linear(patch, width)
        self.pos_embed = nn.Embedding(config["num_positions"], width)
        self.blocks = nn.ModuleList(VisionBlock(config, i) for i in range(config["depth"]))
        self.norm = nn.LayerNorm(width, config["norm_eps"])
        if config["pooled"]:
            self.pooling = AttentionPooling(config)

    def forward(self, pixels_NC: Tensor, grids: list[list[int]]) -> dict[str, Tensor]:
        frames = [h * w for t, h, w in grids for _ in range(t)]
        x_ND = self.patch_embed(pixels_NC.to(self.patch_embed.weight.dtype))
        x_ND = x_ND + torch.cat([self._positions(h, w).repeat(t, 1) for t, h, w in grids])
        scales = {}
        for i, block in enumerate(self.blocks):
            x_ND = scales[str(i)] = block(x_ND, frames, [t * h * w for t, h, w in grids])
        scales["final"] = self.norm(x_ND)
        if self.config["pooled"]:
            scales["pooled"] = self.pooling(scales["final"], frames)
        return scales

    def _positions(self, height: int, width: int) -> Tensor:
        """The square table of learned positions, resampled to a frame."""
        table, merge = self.pos_embed.weight, self.config["merge_size"]
        exact = torch.promote_types(table.dtype, torch.float32)
        table_DRC = table.to(exact).T.unflatten(1, (math.isqrt(len(table)), -1))
        antialias = self.config["naflex"]
        mode = {"mode": "bilinear" if antialias else "bicubic", "antialias": antialias}
        grid_Dhw = F.interpolate(table_DRC[None], size=(height, width), **mode)[0]
        # The patches of a merge x merge square lie behind one another.
        blocks = grid_Dhw.unflatten(2, (-1, merge)).unflatten(1, (-1, merge)).transpose(2, 3)
        return blocks.flatten(1).T.to(table.dtype)


class VisionBlock(nn.Module):
    def __init__(self, config: dict, index: int):
        super().__init__()
        width = config["hidden_size"]
        self.norm1 = nn.LayerNorm(width, config["norm_eps"])
        self.attn = Attention(width, config["num_heads"])
        self.norm2 = nn.LayerNorm(width, config["norm_eps"])
        if index in config["moe_layers"]:
            self.moe = MoE(width, width, config["moe"])
        else:
            self.mlp = MLP(width, config["intermediate_size"])

    def forward(self, x_ND: Tensor, frames: list[int], pictures: list[int]) -> Tensor:
        normed_ND = self.norm1(x_ND)
        x_ND = x_ND + self.attn(normed_ND, normed_ND, frames, frames)
        normed_ND = self.norm2(x_ND)
        return x_ND + (
            self.moe(normed_ND, pictures) if hasattr(self, "moe") else self.mlp(normed_ND)
        )


class Attention(nn.Module):
    """Queries of a frame look at tokens of the same frame; `lens` of the frames in either."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_QD: Tensor, seen_ND: Tensor, lens: list[int], seen: list[int]) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(0, 1).split(lengths, 1)
            for linear, x, lengths in (
                (self.q, x_QD, lens),
                (self.k, seen_ND, seen),
                (self.v, seen_ND, seen),
            )
        )
        out = [
            F.scaled_dot_product_attention(*(x[None] for x in frame))[0]
            for frame in zip(q, k, v, strict=True)
        ]
        return self.o(torch.cat(out, 1).transpose(0, 1).flatten(1))


class AttentionPooling(nn.Module):
    """One learned query looks at all patches of a frame."""

    def __init__(self, config: dict):
        super().__init__()
        width = config["hidden_size"]
        self.probe = nn.Embedding(1, width)
        self.attn = Attention(width, config["num_heads"])
        self.norm = nn.LayerNorm(width, config["norm_eps"])
        self.mlp = MLP(width, config["intermediate_size"])

    def forward(self, x_ND: Tensor, frames: list[int]) -> Tensor:
        probe_ID = self.probe.weight.repeat(len(frames), 1)
        x_ID = self.attn(probe_ID, x_ND, [1] * len(frames), frames)
        return x_ID + self.mlp(self.norm(x_ID))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


# ------------------------------------------------------------------------------------- projector


class Projector(nn.Module):
    """Features [M, D], and what is added behind each of the first decoder layers [M, D]."""

    def __init__(self, config):
        super().__init__()
        projector = config.projector_config
        levels = [level.split(":") for level in projector["levels"]]
        self.layers = [int(layer) for _, layer in levels]
        self.scales = [scale for scale, _ in levels]
        self.depth = len(levels) if projector["depth"] < 0 else projector["depth"]
        self.final = Scale(config, "final")
        self.levels = nn.ModuleList(Scale(config, scale) for scale in self.scales)

    def forward(
        self, scales: dict[str, Tensor], grids: list[list[int]]
    ) -> tuple[Tensor, list[Tensor]]:
        features_MD = self.final(scales["final"], grids)
        found: dict[int, Tensor] = {}
        for j in range(self.depth):
            level_MD = self.levels[j](scales[self.scales[j]], grids)
            layer = self.layers[j]
            found[layer] = found[layer] + level_MD if layer in found else level_MD
        nothing_MD = torch.zeros_like(features_MD)
        return features_MD, [found.get(i, nothing_MD) for i in range(max(found, default=-1) + 1)]


class Scale(nn.Module):
    """One scale's way to the decoder; the pooled one goes to all tokens of its frame."""

    def __init__(self, config, scale: str):
        super().__init__()
        vision, projector = config.vision_config, config.projector_config
        width, layers = vision["hidden_size"], projector["layers"]
        self.config, self.pooled = config, scale == "pooled"
        if config.frame_queries and not self.pooled:
            kind = {"resampler": Resampler, "qformer": QFormer}[projector["reduction"]]
            self.reduce = kind(width, vision["num_heads"], config.frame_queries, layers)
        squares = 1 if self.pooled else vision["merge_size"] ** 2
        self.bridge = Bridge(config, width, squares)

    def forward(self, x_ND: Tensor, grids: list[list[int]]) -> Tensor:
        frames = [h * w for t, h, w in grids for _ in range(t)]
        tokens = [math.prod(self.config.frame_tokens(h, w)) for _, h, w in grids]
        if self.pooled:
            y_ID = self.bridge(x_ND, [t for t, _, _ in grids])
            each = [n for (t, _, _), n in zip(grids, tokens, strict=True) for _ in range(t)]
            return y_ID.repeat_interleave(torch.tensor(each, device=y_ID.device), 0)
        if hasattr(self, "reduce"):
            x_ND = self.reduce(x_ND, frames)
        return self.bridge(x_ND, [t * n for (t, _, _), n in zip(grids, tokens, strict=True)])


class Bridge(nn.Module):
    """[N, D] -> [N / squares, D']: normalise, put neighbours side by side, MLP or experts."""

    def __init__(self, config, width: int, squares: int):
        super().__init__()
        moe, out = config.projector_config["moe"], config.text_config.hidden_size
        self.merged = width * squares
        self.norm = nn.LayerNorm(width, config.vision_config["norm_eps"])
        if moe["experts"] > 0:
            self.moe = MoE(self.merged, out, moe)
        else:
            self.fc1, self.fc2 = nn.Linear(self.merged, self.merged), nn.Linear(self.merged, out)

    def forward(self, x_ND: Tensor, pictures: list[int]) -> Tensor:
        x = self.norm(x_ND).reshape(-1, self.merged)
        return self.moe(x, pictures) if hasattr(self, "moe") else self.fc2(F.gelu(self.fc1(x)))


class Resampler(nn.Module):
    """Learned queries of each frame, [N, D] -> [Q, D]."""

    def __init__(self, width: int, heads: int, queries: int, layers: int):
        super().__init__()
        self.queries = nn.Embedding(queries, width)
        self.layers = nn.ModuleList(ResamplerLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_ND: Tensor, frames: list[int]) -> Tensor:
        x_QD = self.queries.weight.repeat(len(frames), 1)
        for layer in self.layers:
            x_QD = layer(x_QD, x_ND, frames)
        return self.norm(x_QD)


class ResamplerLayer(nn.Module):
    """Queries look at the patches and the queries of their frame, as one sequence."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_queries, self.norm_patches = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_QD: Tensor, patches_ND: Tensor, frames: list[int]) -> Tensor:
        queries = len(x_QD) // len(frames)
        normed_QD, normed_ND = self.norm_queries(x_QD), self.norm_patches(patches_ND)
        pairs = zip(normed_ND.split(frames), normed_QD.split(queries), strict=True)
        seen_ND = torch.cat([part for pair in pairs for part in pair])
        each = [queries] * len(frames)
        x_QD = x_QD + self.attn(normed_QD, seen_ND, each, [n + queries for n in frames])
        return x_QD + self.fc2(F.gelu(self.fc1(self.norm(x_QD))))


class QFormer(nn.Module):
    """Learned queries of each frame, [N, D] -> [Q, D]."""

    def __init__(self, width: int, heads: int, queries: int, layers: int):
        super().__init__()
        self.queries = nn.Embedding(queries, width)
        self.norm = nn.LayerNorm(width, 1e-12)
        self.layers = nn.ModuleList(QFormerLayer(width, heads, i % 2 == 0) for i in range(layers))

    def forward(self, x_ND: Tensor, frames: list[int]) -> Tensor:
        x_QD = self.norm(self.queries.weight).repeat(len(frames), 1)
        for layer in self.layers:
            x_QD = layer(x_QD, x_ND, frames)
        return x_QD


class QFormerLayer(nn.Module):
    """Attention among the queries, in every other layer to the patches, MLP; norms behind."""

    def __init__(self, width: int, heads: int, looks: bool):
        super().__init__()
        self.attn, self.attn_norm = Attention(width, heads), nn.LayerNorm(width, 1e-12)
        if looks:
            self.cross, self.cross_norm = Attention(width, heads), nn.LayerNorm(width, 1e-12)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, 1e-12)

    def forward(self, x_QD: Tensor, patches_ND: Tensor, frames: list[int]) -> Tensor:
        each = [len(x_QD) // len(frames)] * len(frames)
        x_QD = self.attn_norm(x_QD + self.attn(x_QD, x_QD, each, each))
        if hasattr(self, "cross"):
            x_QD = self.cross_norm(x_QD + self.cross(x_QD, patches_ND, each, frames))
        return self.norm(x_QD + self.fc2(F.gelu(self.fc1(x_QD))))
