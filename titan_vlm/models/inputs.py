"""What a model reads: one micro-batch of packed rows.

Everything that decides a shape (document lengths, image grids) is a Python list made on the
host by the data loader, so that no model ever waits for the device to learn it.

Two rows of six tokens, `v` a visual token, `.` padding:

    row 0:  a a v v a .     documents: [a a v v a], padding tail of 1
    row 1:  b b b c c c     documents: [b b b], [c c c]

    doc_lens        = [5, 1, 3, 3]         (the padding tail counts as a document of its own)
    visual_index_M  = [2, 3]               (flattened row-major positions)
    tokens.index_V  = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
"""

from dataclasses import dataclass, field, fields, replace
from itertools import accumulate

import torch
from torch import Tensor

from titan_vlm.models.moe.tokens import Moment, Tokens, tokens_of

IGNORE_LABEL = -100


@dataclass(repr=False)
class Batch:
    """A micro-batch of B rows of S tokens.

    tokens_BS       int64 token ids
    labels_BS       int64 targets, already shifted: the token after position s of the same
                    document where it is trained on, else `IGNORE_LABEL`
    positions_3BS   int64 M-RoPE positions (time, height, width), from 0 in every document
    valid_BS        bool, False on padding
    doc_lens        lengths of the documents, row-major; sums to B * S
    pixels_NC       float32 patches of all images and videos, in order of appearance; N may be 0
    grids           (t, h, w) in patches of each image or video
    visual_index_M  int64 flattened positions of the visual tokens, in order
    sample_keys     a number that names each sample, in order; random numbers are drawn by it
    image_keys      the same of each image or video
    sources         of each sample, which of the sources that are mixed
    moment          where in the run the batch stands
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    positions_3BS: Tensor
    valid_BS: Tensor
    doc_lens: list[int]
    pixels_NC: Tensor
    grids: list[tuple[int, int, int]]
    visual_index_M: Tensor
    num_samples: int = 0
    num_images: int = 0
    sample_keys: list[int] | None = None
    image_keys: list[int] | None = None
    sources: list[int] | None = None
    moment: Moment = field(default_factory=Moment)
    # The tokens that are no padding, for the MoE layers; made here, on the host.
    tokens: Tokens | None = None
    # The batch as the loader made it, where its tensors can be looked at without waiting.
    host: "Batch | None" = None

    def __post_init__(self) -> None:
        if self.tokens is None:
            valid_T = self.valid_BS.flatten()
            self.tokens = tokens_of(self.doc_lens, self.sample_keys, valid_T, self.moment)

    def __repr__(self) -> str:
        rows, length = self.tokens_BS.shape
        return f"Batch({rows} x {length}, {self.num_samples} samples, {self.num_images} images)"

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding, known on the host."""
        return len(self.tokens)

    @property
    def sample_lens(self) -> list[int]:
        """Lengths of the documents that are no padding, on the host."""
        tokens = self.on_host.tokens
        return torch.bincount(tokens.sequence_V, minlength=tokens.num_sequences).tolist()

    @property
    def doc_keys(self) -> list[int]:
        """Of each document of `doc_lens` the key of its sample, 0 of padding; on the host."""
        host, length = self.on_host, self.tokens_BS.shape[1]
        keys, found = iter(host.tokens.keys_N.tolist()), []
        for start in accumulate(self.doc_lens[:-1], initial=0):
            row, place = divmod(start, length)  # of rows that may be padded further than the host's
            is_sample = place < host.valid_BS.shape[1] and bool(host.valid_BS[row, place])
            found.append(next(keys) if is_sample else 0)
        return found

    def visual_tokens(self, patches: int = 1) -> Tokens:
        """What the MoE layers of a vision tower are told, on the batch's device: a token is as many
        patches, a sequence an image or video."""
        lens = [t * h * w // patches for t, h, w in self.grids]
        tokens = tokens_of(lens, self.image_keys, None, self.moment)
        return tokens.to(self.tokens_BS.device)

    @property
    def num_targets(self) -> Tensor:
        """Scalar int64 tensor on the batch's device: positions that a loss counts."""
        return (self.labels_BS != IGNORE_LABEL).sum()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        return Batch(**moved | {"tokens": self.tokens.to(device), "host": self.on_host})

    @property
    def on_host(self) -> "Batch":
        """The batch as it was before it went to a device."""
        return self.host or self

    def with_indices(self, **indices: Tensor | Tokens) -> "Batch":
        """The same batch with other indices, given on the host."""
        device = self.tokens_BS.device
        moved = {
            name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x.to(device)
            for name, x in indices.items()
        }
        return replace(self, **moved, host=self.on_host)
