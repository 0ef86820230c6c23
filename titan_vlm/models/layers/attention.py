"""Attention over packed documents, without cross-talk and without an S x S mask.

The tokens of all rows lie flattened behind one another and `Documents` says where each document
ends; no token sees another document. This file is the one place that chooses the kernel:

- CUDA in half precision: `varlen_attn`, FlashAttention's variable-length kernel, one launch.
- everything else (CPU, float32, float64): scaled_dot_product_attention document by document,
  neighbours of equal length in one call. Its cost is the sum of the squared lengths.
"""

from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

# T tokens, H query heads, G key/value heads, C head width


class Documents:
    """Lengths in tokens of the documents, in order.

    A plain object and not the list itself: on a list's length torch.compile would specialise, and
    compile every block anew for each number of documents.
    """

    def __init__(self, lens: list[int]):
        self.lens = lens
        self._cumulative: Tensor | None = None

    def cumulative(self, device: torch.device) -> Tensor:
        """int32 ends of the documents, from 0 on; made once for all layers."""
        if self._cumulative is None:
            ends = torch.tensor(list(accumulate(self.lens, initial=0)), dtype=torch.int32)
            self._cumulative = ends.pin_memory().to(device, non_blocking=True)
        return self._cumulative


# Lengths differ from batch to batch: a trace would be specialised to one packing and thrown away.
@torch.compiler.disable
def attend(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    documents: Documents,
    causal: bool,
) -> Tensor:
    """Softmax attention within each document; grouped-query when G < H.

    Args:
        documents: their lengths sum to T.
        causal: whether a token sees only its own past.

    Returns:
        [T, H, C] in the dtype of `q_THC`.
    """
    if q_THC.is_cuda and q_THC.dtype in (torch.bfloat16, torch.float16) and q_THC.numel():
        return _attend_varlen(q_THC, k_TGC, v_TGC, documents, causal)
    return _attend_by_document(q_THC, k_TGC, v_TGC, documents.lens, causal)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:  # `enable_gqa` is younger than the oldest PyTorch supported
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    cumulative, longest = documents.cumulative(q.device), max(documents.lens)
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(q, k, v, cumulative, cumulative, longest, longest, window_size=window)


def _attend_by_document(
    q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, doc_lens: list[int], causal: bool
) -> Tensor:
    runs = [(length, sum(1 for _ in group)) for length, group in groupby(doc_lens)]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), q, k, v in zip(
        runs, q_THC.split(sizes), k_TGC.split(sizes), v_TGC.split(sizes), strict=True
    ):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if not outputs:  # no document: keep the graph, so that every rank's backward is the same
        return q_THC + 0 * (k_TGC.sum() + v_TGC.sum())
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
