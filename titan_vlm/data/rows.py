"""Rows: packed samples as tensors, and rows concatenated into the batch a model reads.

Shapes: `S` tokens of a row, `N` patches, `C` values of a patch, `M` visual tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from titan_vlm.data.chat import Encoder, Sample
from titan_vlm.data.packing import Counts
from titan_vlm.errors import DataError
from titan_vlm.models.inputs import IGNORE_LABEL, Batch
from titan_vlm.models.moe.tokens import Moment, name_key


@dataclass
class Row:
    """One packed row. The padding tail, if any, is the last entry of `doc_lens`."""

    tokens_S: Tensor
    labels_S: Tensor
    positions_3S: Tensor
    valid_S: Tensor
    doc_lens: list[int]
    pixels_NC: Tensor
    grids: list[tuple[int, int, int]]
    visual_index_M: Tensor  # positions within the row
    sample_ids: list[str]
    origins: list[str]  # of each sample, its file and line
    sources: list[int]  # of each sample, which of the sources that are mixed
    images_of: list[int]  # number of images and videos of each sample
    # What became of the samples read since the shard's previous row, by source; the ids of those
    # left out, and why the last bad ones are.
    counts_of: list[Counts] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    ended: bool = False  # the shard has no samples left

    @property
    def counts(self) -> Counts:
        return sum(self.counts_of, Counts())

    @property
    def num_images(self) -> int:
        return sum(self.images_of)


def make_row(
    samples: list[Sample],
    seq_len: int,
    encoder: Encoder,
    on_broken: Callable[[Sample, DataError], None] | None = None,
) -> Row:
    """Decodes the pixels and lays the samples out; a sample with a broken picture is left out.

    Without `on_broken` the DataError is raised instead.
    """
    spec = encoder.spec
    kept, pixels = [], []
    for sample in samples:
        try:
            decoded = [visual.pixels(spec) for visual in sample.visuals]
        except DataError as error:
            if on_broken is None:
                raise
            on_broken(sample, error)
            continue
        kept.append(sample)
        pixels += decoded

    used = sum(map(len, kept))
    padding = seq_len - used
    tokens_S = np.full(seq_len, encoder.pad_id, dtype=np.int64)
    labels_S = np.full(seq_len, IGNORE_LABEL, dtype=np.int64)
    positions_3S = np.zeros((3, seq_len), dtype=np.int64)
    visual_S = np.zeros(seq_len, dtype=bool)
    at = 0
    for sample in kept:
        span = slice(at, at + len(sample))
        tokens_S[span], labels_S[span] = sample.tokens_L, sample.labels_L
        positions_3S[:, span], visual_S[span] = sample.positions_3L, sample.visual_L
        at += len(sample)
    pixels_NC = np.concatenate(pixels) if pixels else np.empty((0, spec.patch_dim), np.float32)
    return Row(
        tokens_S=torch.from_numpy(tokens_S),
        labels_S=torch.from_numpy(labels_S),
        positions_3S=torch.from_numpy(positions_3S),
        valid_S=torch.arange(seq_len) < used,
        doc_lens=[len(sample) for sample in kept] + ([padding] if padding else []),
        pixels_NC=torch.from_numpy(pixels_NC),
        grids=[visual.grid for sample in kept for visual in sample.visuals],
        visual_index_M=torch.from_numpy(visual_S.nonzero()[0]),
        sample_ids=[sample.id for sample in kept],
        origins=[sample.origin for sample in kept],
        sources=[sample.source for sample in kept],
        images_of=[len(sample.visuals) for sample in kept],
    )


def collate(rows: list[Row], moment: Moment | None = None) -> Batch:
    """B rows of S tokens as one batch, at a moment of the run."""
    seq_len = len(rows[0].tokens_S)
    samples = [pair for row in rows for pair in zip(row.sample_ids, row.images_of, strict=True)]
    return Batch(
        tokens_BS=torch.stack([row.tokens_S for row in rows]),
        labels_BS=torch.stack([row.labels_S for row in rows]),
        positions_3BS=torch.stack([row.positions_3S for row in rows], dim=1),
        valid_BS=torch.stack([row.valid_S for row in rows]),
        doc_lens=[length for row in rows for length in row.doc_lens],
        pixels_NC=torch.cat([row.pixels_NC for row in rows]),
        grids=[grid for row in rows for grid in row.grids],
        visual_index_M=torch.cat([row.visual_index_M + b * seq_len for b, row in enumerate(rows)]),
        num_samples=len(samples),
        num_images=sum(images for _, images in samples),
        sample_keys=[name_key(name) for name, _ in samples],
        image_keys=[name_key(f"{name} {i}") for name, images in samples for i in range(images)],
        sources=[source for row in rows for source in row.sources],
        moment=moment or Moment(),
    )
