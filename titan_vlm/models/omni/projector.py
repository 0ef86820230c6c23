"""From the scales of the vision tower to features of the text width.

    "final" [N, Dv] -> reduce -> bridge -> [M, D]    stands in for the visual tokens' embeddings
    "2"     [N, Dv] -> reduce -> bridge -> [M, D]    added behind a decoder layer   (DeepStack)
    "pooled" [I, Dv]          -> bridge -> [I, D]    the same, to all tokens of its frame

Each scale has its own way through. How patches are reduced:

    none        M = N
    merge       2 x 2 neighbours side by side: M = N / 4, of width 4 Dv
    resampler   per frame, as many learned queries as projector.tokens look at its patches and at
                each other (Perceiver resampler of Flamingo, arXiv 2204.14198)
    qformer     queries look at each other, and every other layer at the patches (BLIP-2,
                arXiv 2301.12597)

A bridge is a normalisation and an MLP, or experts. DeepStack: arXiv 2406.04334.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_vlm.models.inputs import Batch
from titan_vlm.models.layers.attention import Documents
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.tokens import Tokens, tokens_of
from titan_vlm.models.omni.config import FINAL, POOLED, OmniConfig
from titan_vlm.models.omni.vision import CrossAttention, frame_lens

# N patches, M visual tokens, I frames, Q queries of a frame, D widths

QFORMER_EPS = 1e-12  # BERT's


class Projector(nn.Module):
    """See the module docstring. `depth` levels are in use; a stage of a run may change it."""

    def __init__(self, config: OmniConfig):
        super().__init__()
        self.config = config
        depth = config.projector.depth
        self.depth = len(config.levels) if depth < 0 else depth
        self.final = Scale(config, FINAL, "projector.final")
        self.levels = nn.ModuleDict(
            {
                str(j): Scale(config, scale, f"projector.levels.{j}")
                for j, (scale, _) in enumerate(config.levels)
            }
        )

    @property
    def scales(self) -> list[str]:
        """Those in use."""
        return [FINAL, *(scale for scale, _ in self.config.levels[: self.depth])]

    @property
    def all_scales(self) -> list[str]:
        """Those that some stage of a run may use."""
        return sorted({FINAL, *(scale for scale, _ in self.config.levels)})

    def forward(self, scales: dict[str, Tensor], batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Features [M, D], and what is added behind each of the first decoder layers [M, D]."""
        frames = Documents(frame_lens(batch))
        features_MD = self.final(scales[FINAL], batch, frames)
        found: dict[int, Tensor] = {}
        for level, (scale, layer) in zip(
            list(self.levels.values())[: self.depth], self.config.levels, strict=False
        ):
            level_MD = level(scales[scale], batch, frames)
            found[layer] = found[layer] + level_MD if layer in found else level_MD
        nothing_MD = torch.zeros_like(features_MD)
        # Also for levels that are not in use: what a pipeline hands on has one shape in all stages.
        last = max((layer for _, layer in self.config.levels), default=-1)
        return features_MD, [found.get(i, nothing_MD) for i in range(last + 1)]


class Scale(nn.Module):
    """One scale's way from the vision tower to the decoder."""

    def __init__(self, config: OmniConfig, scale: str, name: str):
        super().__init__()
        vision, projector = config.vision, config.projector
        width = vision.hidden_size
        self.pooled = scale == POOLED
        self.merge, self.queries = vision.merge_size, config.queries
        if self.queries and not self.pooled:
            kind = {"resampler": Resampler, "qformer": QFormer}[projector.reduction]
            self.reduce = kind(width, vision.head_dim, projector.tokens, projector.layers)
        squares = 1 if self.pooled else self.merge**2
        self.bridge = Bridge(config, width, squares, name)

    def forward(self, x_ND: Tensor, batch: Batch, frames: Documents) -> Tensor:
        device, experts = x_ND.device, hasattr(self.bridge, "moe")
        per_picture = [t for t, _, _ in batch.grids]
        if self.pooled:
            tokens = _tokens(per_picture, batch) if experts else None
            y_ID = self.bridge(x_ND, tokens)
            each = [self.queries or n // self.merge**2 for n in frames.lens]
            repeats = torch.tensor(each, dtype=torch.int64).to(device)
            return y_ID.repeat_interleave(repeats, 0, output_size=sum(each))
        if self.queries:
            x_ND = self.reduce(x_ND, frames)
            lens = [t * self.queries for t in per_picture]
        else:
            lens = [t * h * w // self.merge**2 for t, h, w in batch.grids]
        return self.bridge(x_ND, _tokens(lens, batch) if experts else None)


def _tokens(lens: list[int], batch: Batch) -> Tokens:
    """What the experts are told of a projector's tokens; a sequence is a picture or video."""
    return tokens_of(lens, batch.image_keys, None, batch.moment).to(batch.tokens_BS.device)


class Bridge(nn.Module):
    """[N, Dv] -> [N / squares, D]: normalise, put neighbours side by side, MLP or experts."""

    def __init__(self, config: OmniConfig, width: int, squares: int, name: str):
        super().__init__()
        moe, out = config.projector_moe, config.text.hidden_size
        self.merged = width * squares
        self.norm = nn.LayerNorm(width, config.vision.norm_eps)
        if moe.experts > 0:
            sizes = (self.merged, moe.expert_width, moe.experts, moe.top_k)
            self.moe = MoE(*sizes, moe, out=out, name=name)
        else:
            self.fc1 = nn.Linear(self.merged, self.merged)
            self.fc2 = nn.Linear(self.merged, out)

    def forward(self, x_ND: Tensor, tokens: Tokens | None) -> Tensor:
        x = self.norm(x_ND).reshape(-1, self.merged)
        if hasattr(self, "moe"):
            return self.moe(x, tokens)
        return self.fc2(F.gelu(self.fc1(x)))


class Resampler(nn.Module):
    """`queries` tokens of each frame, [N, D] -> [I * Q, D]."""

    def __init__(self, width: int, head_dim: int, queries: int, layers: int):
        super().__init__()
        self.queries = nn.Embedding(queries, width)
        self.layers = nn.ModuleDict(
            {str(i): ResamplerLayer(width, head_dim) for i in range(layers)}
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x_ND: Tensor, frames: Documents) -> Tensor:
        x_QD = self.queries.weight.repeat(len(frames.lens), 1)
        for layer in self.layers.values():
            x_QD = layer(x_QD, x_ND, frames)
        return self.norm(x_QD)


class ResamplerLayer(nn.Module):
    """Queries look at the patches and the queries of their frame, as one sequence."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.norm_queries = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        self.attn = CrossAttention(width, width, head_dim)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_QD: Tensor, patches_ND: Tensor, frames: Documents) -> Tensor:
        normed_QD, normed_ND = self.norm_queries(x_QD), self.norm_patches(patches_ND)
        queries = Documents([len(x_QD) // max(len(frames.lens), 1)] * len(frames.lens))
        pairs = zip(normed_ND.split(frames.lens), normed_QD.split(queries.lens), strict=True)
        seen_D = torch.cat([normed_ND[:0], *(part for pair in pairs for part in pair)])
        keys = Documents([n + q for n, q in zip(frames.lens, queries.lens, strict=True)])
        x_QD = x_QD + self.attn(normed_QD, seen_D, queries, keys)
        return x_QD + self.fc2(F.gelu(self.fc1(self.norm(x_QD))))


class QFormer(nn.Module):
    """`queries` tokens of each frame, [N, D] -> [I * Q, D]."""

    def __init__(self, width: int, head_dim: int, queries: int, layers: int):
        super().__init__()
        self.queries = nn.Embedding(queries, width)
        self.norm = nn.LayerNorm(width, QFORMER_EPS)
        self.layers = nn.ModuleDict(
            {str(i): QFormerLayer(width, head_dim, looks=i % 2 == 0) for i in range(layers)}
        )

    def forward(self, x_ND: Tensor, frames: Documents) -> Tensor:
        x_QD = self.norm(self.queries.weight).repeat(len(frames.lens), 1)
        for layer in self.layers.values():
            x_QD = layer(x_QD, x_ND, frames)
        return x_QD


class QFormerLayer(nn.Module):
    """Attention among the queries, in every other layer to the patches, MLP; norms behind."""

    def __init__(self, width: int, head_dim: int, looks: bool):
        super().__init__()
        self.attn = CrossAttention(width, width, head_dim)
        self.attn_norm = nn.LayerNorm(width, QFORMER_EPS)
        if looks:
            self.cross = CrossAttention(width, width, head_dim)
            self.cross_norm = nn.LayerNorm(width, QFORMER_EPS)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, QFORMER_EPS)

    def forward(self, x_QD: Tensor, patches_ND: Tensor, frames: Documents) -> Tensor:
        queries = Documents([len(x_QD) // max(len(frames.lens), 1)] * len(frames.lens))
        x_QD = self.attn_norm(x_QD + self.attn(x_QD, x_QD, queries, queries))
        if hasattr(self, "cross"):
            x_QD = self.cross_norm(x_QD + self.cross(x_QD, patches_ND, queries, frames))
        return self.norm(x_QD + self.fc2(F.gelu(self.fc1(x_QD))))
