"""Attention over packed documents, without cross-talk and without an S x S mask.

The tokens of all rows lie flattened behind one another and `Documents` says where each document
ends; no token sees another document. This file is the one place that chooses the kernel:

- CUDA in half precision: `varlen_attn`, FlashAttention's variable-length kernel, one launch.
- everything else (CPU, float32, float64): scaled_dot_product_attention document by document,
  neighbours of equal length in one call. Its cost is the sum of the squared lengths.
- dropout: the same in plain products, which keep the weights of all heads. Kernels draw random
  numbers in an order that depends on the mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_vlm.models.moe.noise import uniform
from titan_vlm.models.moe.tokens import Moment, tokens_of

# T tokens, H query heads, G key/value heads, C head width


class Documents:
    """Lengths in tokens of the documents, in order.

    A plain object and not the list itself: on a list's length torch.compile would specialise, and
    compile every block anew for each number of documents.

    Args:
        keys: of each the number by which dropout draws.
    """

    def __init__(self, lens: list[int], keys: list[int] | None = None):
        self.lens = lens
        self.keys = keys or [0] * len(lens)
        self._cumulative: Tensor | None = None

    def cumulative(self, device: torch.device) -> Tensor:
        """int32 ends of the documents, from 0 on; made once for all layers."""
        if self._cumulative is None:
            ends = torch.tensor(list(accumulate(self.lens, initial=0)), dtype=torch.int32)
            self._cumulative = ends.pin_memory().to(device, non_blocking=True)
        return self._cumulative


@dataclass(frozen=True)
class Dropout:
    """Leaves a part of the attention weights out, as large as `rate`, and scales the others up.

    Which, is a hash of the moment, the layer, the head (`first_head` is the number of the first one
    here), the document's key and the places of both tokens: the same on every mesh.
    """

    rate: float
    layer: str
    moment: Moment
    first_head: int = 0

    def __call__(self, weights_NHSS: Tensor, keys: list[int]) -> Tensor:
        """Of N documents of one length."""
        _, heads, length, _ = weights_NHSS.shape
        tokens = tokens_of([length] * len(keys), keys, None, self.moment).to(weights_NHSS.device)
        numbers_HTS = [
            uniform(tokens, self.layer, f"attention.{head}", length, torch.float32)
            for head in range(self.first_head, self.first_head + heads)
        ]
        kept_HNSS = (torch.stack(numbers_HTS) >= self.rate).unflatten(1, (len(keys), length))
        return weights_NHSS * kept_HNSS.transpose(0, 1) / (1 - self.rate)


# Lengths differ from batch to batch: a trace would be specialised to one packing and thrown away.
@torch.compiler.disable
def attend(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    documents: Documents,
    causal: bool,
    keys: Documents | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Softmax attention within each document; grouped-query when G < H.

    Args:
        documents: their lengths sum to T.
        causal: whether a token sees only its own past.
        keys: where queries look at other tokens than their own, the lengths of each document's
            keys and values, none of them 0.
        dropout: of tokens that look at their own document.

    Returns:
        [T, H, C] in the dtype of `q_THC`.
    """
    if dropout is not None:
        return _attend_by_document(q_THC, k_TGC, v_TGC, documents, documents, causal, dropout)
    keys = keys or documents
    if q_THC.is_cuda and q_THC.dtype in (torch.bfloat16, torch.float16) and q_THC.numel():
        return _attend_varlen(q_THC, k_TGC, v_TGC, documents, keys, causal)
    return _attend_by_document(q_THC, k_TGC, v_TGC, documents, keys, causal)


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, keys: Documents, causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:  # `enable_gqa` is younger than the oldest PyTorch supported
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    ends = [x.cumulative(q.device) for x in (documents, keys)]
    longest = [max(x.lens) for x in (documents, keys)]
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(q, k, v, *ends, *longest, window_size=window)


def _attend_by_document(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    documents: Documents,
    keys_of: Documents,
    causal: bool,
    dropout: Dropout | None = None,
) -> Tensor:
    pairs = zip(documents.lens, keys_of.lens, strict=True)
    runs = [(*lens, sum(1 for _ in group)) for lens, group in groupby(pairs)]
    query_sizes = [queries * count for queries, _, count in runs]
    key_sizes = [keys * count for _, keys, count in runs]
    outputs = []
    names = iter(documents.keys)
    for (queries, keys, count), q, k, v in zip(
        runs,
        q_THC.split(query_sizes),
        k_TGC.split(key_sizes),
        v_TGC.split(key_sizes),
        strict=True,
    ):
        q = q.unflatten(0, (count, queries)).transpose(1, 2)
        k, v = (x.unflatten(0, (count, keys)).transpose(1, 2) for x in (k, v))
        if dropout is not None:
            out = _plain(q, k, v, causal, partial(dropout, keys=list(islice(names, count))))
        else:
            gqa = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if not outputs:  # no document: keep the graph, so that every rank's backward is the same
        return q_THC + 0 * (k_TGC.sum() + v_TGC.sum())
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _plain(
    q_NHSC: Tensor, k_NGSC: Tensor, v_NGSC: Tensor, causal: bool, dropout: Callable
) -> Tensor:
    repeat = q_NHSC.shape[1] // k_NGSC.shape[1]
    k_NHSC, v_NHSC = (x.repeat_interleave(repeat, 1) for x in (k_NGSC, v_NGSC))
    scores_NHSS = (q_NHSC * q_NHSC.shape[-1] ** -0.5) @ k_NHSC.transpose(2, 3)
    scores_NHSS = scores_NHSS.to(torch.promote_types(scores_NHSS.dtype, torch.float32))
    if causal:
        future_SS = scores_NHSS.new_ones(scores_NHSS.shape[2:], dtype=torch.bool).triu(1)
        scores_NHSS = scores_NHSS.masked_fill(future_SS, float("-inf"))
    return dropout(scores_NHSS.softmax(-1)).to(v_NHSC.dtype) @ v_NHSC
