"""Cross-entropy over a large vocabulary that never holds all logits.

8,192 tokens x 151,936 words are 5 GB of float32 logits, and autograd keeps them two or three times.
Here the head and the loss are one function: tokens are taken `chunk_tokens` at a time, and as soon
as a chunk's logits exist its loss and its gradients are computed, *in the forward pass*. Nothing
is computed twice and the logits of one chunk are all that ever exists. What waits for the backward
pass is the gradient of the hidden states and of the weight, each as large as the thing itself;
backward only multiplies them by the upstream gradient.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from titan_vlm.models.inputs import IGNORE_LABEL
from titan_vlm.models.shards import local_part

# B rows, S sequence, D width, V vocabulary, T valid tokens, C tokens of one chunk


def chunked_cross_entropy(
    hidden_BSD: Tensor,
    weight_VD: Tensor,
    labels_BS: Tensor,
    chunk_tokens: int,
    tally: "Tally | None" = None,
) -> Tensor:
    """Sum of the cross-entropies of all positions whose label is not -100.

    Logits are made in the dtype of `hidden_BSD` (under autocast: in autocast's); softmax, loss and
    the accumulated weight gradient are float32 at least.

    Args:
        labels_BS: target of each position (already shifted), -100 where there is none.
        chunk_tokens: how many tokens have logits at a time.
        tally: takes in the loss of every token, for who wants to know it by group.

    `weight_VD` may be a DTensor with the words sharded over ranks that all have the same hidden
    states: no logits are gathered, and the gradient of the hidden states is this rank's summand.

    Returns:
        A scalar, float32 or float64. With no valid target at all it is 0 and still part of the
        graph, so that the hooks of a sharded model run on every rank.
    """
    device = hidden_BSD.device.type
    dtype = hidden_BSD.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    group, first_word = None, 0
    if isinstance(weight_VD, DTensor):
        _, (words, _) = local_part(weight_VD)
        group, first_word = weight_VD.device_mesh.get_group(), words.start
        weight_VD = weight_VD.to_local(grad_placements=[Shard(0)])
    vocabulary = Vocabulary(group, first_word)
    return _ChunkedCrossEntropy.apply(
        hidden_BSD,
        weight_VD,
        labels_BS,
        chunk_tokens,
        dtype,
        vocabulary,
        tally,
        torch.is_grad_enabled(),
    )


@dataclass(frozen=True)
class Tally:
    """Cross-entropies added up by group of tokens, without gradients.

    group_BS    int64 number of the group of each position
    sums_2G     float64; of each group the sum of its losses and the number of its targets
    """

    group_BS: Tensor
    sums_2G: Tensor

    def add(self, index_C: Tensor, loss_C: Tensor) -> None:
        """The losses of some positions of the flattened batch."""
        groups_G = torch.arange(self.sums_2G.shape[1], device=loss_C.device)
        # As sums of products, not index_add_, whose order on a GPU is any.
        is_of_CG = self.group_BS.flatten()[index_C].unsqueeze(-1) == groups_G
        self.sums_2G[0] += (loss_C.double().unsqueeze(-1) * is_of_CG).sum(0)
        self.sums_2G[1] += is_of_CG.sum(0)


@dataclass(frozen=True)
class Vocabulary:
    """Which words this rank has: all, or with a group those from `first_word` on."""

    group: ProcessGroup | None
    first_word: int

    def local(self, labels_C1: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
        """Labels among the words of this rank, and where they are; elsewhere 0 stands in."""
        local_C1 = labels_C1 - self.first_word
        here_C1 = (local_C1 >= 0) & (local_C1 < num_words)
        return local_C1.where(here_C1, 0), here_C1

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """`x` reduced over the ranks: one number for each token of the chunk."""
        if self.group is not None:
            dist.all_reduce(x, op, group=self.group)
        return x


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_BSD, weight_VD, labels_BS, chunk_tokens, dtype, words, tally, grad_enabled
    ):
        # A custom function sees needs_input_grad even under no_grad, hence the extra argument.
        needs_hidden = grad_enabled and ctx.needs_input_grad[0]
        needs_weight = grad_enabled and ctx.needs_input_grad[1]
        with torch.autocast(hidden_BSD.device.type, enabled=False):
            loss, grad_hidden, grad_weight = _loss_and_gradients(
                hidden_BSD,
                weight_VD,
                labels_BS,
                chunk_tokens,
                dtype,
                words,
                tally,
                needs_hidden,
                needs_weight,
            )
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.upstream = None
        ctx.dtypes = (hidden_BSD.dtype, weight_VD.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradients = ctx.saved_tensors
        if ctx.upstream is None:
            # Scaled in place: the weight gradient is as large as the vocabulary matrix. As `data`,
            # or autograd would refuse to hand them out once more.
            for grad in gradients:
                if grad is not None:
                    grad.data.mul_(upstream)
            ctx.upstream = upstream
        elif ctx.upstream.data_ptr() != upstream.data_ptr():
            raise RuntimeError(
                "chunked_cross_entropy: backward ran twice; its gradients are scaled"
            )
        # A pipeline that splits the backward pass asks once for the hidden states' gradient and,
        # with the same upstream, once for the weight's.
        grads = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * 6


def _loss_and_gradients(
    hidden_BSD: Tensor,
    weight_VD: Tensor,
    labels_BS: Tensor,
    chunk_tokens: int,
    dtype: torch.dtype,
    words: Vocabulary,
    tally: Tally | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    exact = torch.promote_types(dtype, torch.float32)
    labels = labels_BS.flatten()
    # Only tokens that count are multiplied with the vocabulary. The one wait for the device here.
    index_T = (labels != IGNORE_LABEL).nonzero().squeeze(-1)
    hidden_TD = hidden_BSD.flatten(0, -2)[index_T].to(dtype)
    labels_T1 = labels[index_T].unsqueeze(-1)
    weight = weight_VD.to(dtype)

    loss = torch.zeros((), dtype=exact, device=hidden_BSD.device)
    # Written to row by row, so contiguous even where the hidden states are not.
    grad_hidden = hidden_BSD.new_zeros(hidden_BSD.shape, dtype=exact) if needs_hidden else None
    grad_weight = torch.zeros_like(weight_VD, dtype=exact) if needs_weight else None

    # Made once for all chunks: fresh memory of this size costs a CPU more than the arithmetic.
    buffer_CV = hidden_TD.new_empty(min(chunk_tokens, len(index_T)), weight.shape[0])
    exact_CV = buffer_CV if dtype == exact else buffer_CV.new_empty(buffer_CV.shape, dtype=exact)

    for start in range(0, index_T.numel(), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        hidden_CD, labels_C1 = hidden_TD[chunk], labels_T1[chunk]
        logits_CV = torch.mm(hidden_CD, weight.t(), out=buffer_CV[: len(hidden_CD)])
        exp_CV = exact_CV[: len(hidden_CD)]
        if dtype != exact:
            exp_CV.copy_(logits_CV)
        local_C1, here_C1 = words.local(labels_C1, weight.shape[0])
        exp_CV.sub_(words.reduce(exp_CV.amax(-1, keepdim=True), dist.ReduceOp.MAX))
        target_C1 = exp_CV.gather(-1, local_C1).where(here_C1, 0)
        target_C1 = words.reduce(target_C1, dist.ReduceOp.SUM)
        sum_C1 = words.reduce(exp_CV.exp_().sum(-1, keepdim=True), dist.ReduceOp.SUM)
        loss_C1 = sum_C1.log() - target_C1
        loss += loss_C1.sum()
        if tally is not None:
            tally.add(index_T[chunk], loss_C1.squeeze(-1))
        if grad_hidden is None and grad_weight is None:
            continue
        # d loss / d logits = softmax - one_hot. The target's entry is subtracted before rounding
        # to `dtype`: 0.999 - 1 would lose all its digits in bfloat16.
        at_target_C1 = target_C1.exp() / sum_C1 - 1
        exp_CV.div_(sum_C1)
        exp_CV.scatter_(-1, local_C1, at_target_C1.where(here_C1, exp_CV.gather(-1, local_C1)))
        grad_CV = exp_CV if dtype == exact else logits_CV.copy_(exp_CV)
        if grad_hidden is not None:
            grad_hidden.flatten(0, -2)[index_T[chunk]] = (grad_CV @ weight).to(exact)
        if grad_weight is not None:
            _add_product(grad_weight, grad_CV.t(), hidden_CD)
    return loss, grad_hidden, grad_weight


def _add_product(total_VD: Tensor, a_VC: Tensor, b_CD: Tensor) -> None:
    """`total_VD += a_VC @ b_CD`, the sum kept in the dtype of `total_VD`."""
    if a_VC.dtype == total_VD.dtype:
        total_VD.addmm_(a_VC, b_CD)
    else:
        total_VD.add_(a_VC @ b_CD)
