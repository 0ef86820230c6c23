"""Tensor parallelism: each matrix product is split over the ranks of `mesh.tp`.

    weight     split over     a rank computes
    column     outputs        some outputs from all inputs: heads, hidden units, words
    row        inputs         from its share of the inputs a summand of all outputs

A column and a row behind one another (q k v, o; gate up, down) need one exchange before and one
behind the pair. What lies between the pairs (norms, residuals, experts) is either computed by all
ranks alike, or with `sequence_parallel` each rank has its part of every row's positions:

                        sequence parallel                      without
    into a pair         all-gather of the positions            nothing
    out of a pair       reduce-scatter to the positions        all-reduce
    an MoE layer        takes the positions as they are        its tokens are padded to a multiple
                                                               of the ranks, sliced, and gathered

In an MoE layer every rank so has tokens of its own: no token is computed twice, and the gradients
of routers, like those of norms over parts, are partial: summed over `tp` once, by FSDP2, which
finds the parameter replicated and its gradient `Partial`.

The model is plain; here the `forward` of single modules is replaced on the instance, and `Batch`
is told which positions are this rank's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard

from titan_vlm import collectives
from titan_vlm.config import Parallelism
from titan_vlm.mesh import Mesh
from titan_vlm.models.inputs import Batch
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.tokens import Tokens
from titan_vlm.parallel import async_tensor
from titan_vlm.parallel.local import compute_locally, shard_parameter, tie, tied_parameters

POSITIONS = 1  # the dimension of [B, S, D] that sequence parallelism splits


@dataclass
class Split:
    """What the replaced forwards of one model share."""

    mesh: DeviceMesh
    group: ProcessGroup
    sequence: bool
    # Of the batch in flight:
    length: int = 0  # S before padding
    features: Tensor | None = None  # which visual features belong to this rank's positions

    def enter(self, x_BSD: Tensor) -> Tensor:
        """Into a column-row pair."""
        if self.sequence:
            return collectives.gather_partial(x_BSD, POSITIONS, self.group)
        return collectives.copy_to(x_BSD, self.group)

    def leave(self, x_BSD: Tensor) -> Tensor:
        """Out of it."""
        if self.sequence:
            return collectives.reduce_scatter(x_BSD, POSITIONS, self.group)
        return collectives.reduce_from(x_BSD, self.group)


def apply(model: nn.Module, mesh: Mesh, config: Parallelism) -> nn.Module:
    """Split `model` as its `tensor_plan()` says; returns `model`. Comes before everything else."""
    if mesh.tp is None:
        return model
    split = Split(mesh.tp, mesh.tp.get_group(), config.sequence_parallel)
    modules = dict(model.named_modules())
    tied = tied_parameters(model)
    plan = model.tensor_plan(split.group.size())
    for style, names in plan.items():
        for name in names:
            if style != "pair" or not config.async_tp:
                STYLES[style](modules[name], split)
    if config.async_tp:
        async_tensor.prepare(mesh.tp)
        for name in plan["pair"]:
            columns, (row,) = (
                [modules[linear] for linear in plan[style] if linear.startswith(f"{name}.")]
                for style in ("column", "row")
            )
            async_tensor.pair(modules[name], columns, row, split.group)
    for name, module in modules.items():
        if hasattr(module, "first_head"):
            module.first_head = split.group.rank() * (module.num_heads // split.group.size())
        if isinstance(module, MoE):
            # Pictures are not split along the sequence.
            sees_pictures = name.partition(".")[0] in model.sees_pictures
            _experts(module, split, split.sequence and not sees_pictures)
    tie(tied)
    model.register_forward_pre_hook(partial(_begin, split=split), with_kwargs=True)
    last = getattr(model, model.sees_pictures[-1])
    if split.sequence and last is not None:
        last.register_forward_hook(lambda _, args, out: _own_features(out, split))
    return model


# ---------------------------------------------------------------------------- the batch


def _begin(_, args: tuple, kwargs: dict, split: Split) -> tuple[tuple, dict]:
    """The model's arguments, the batch with the positions of this rank."""
    if "batch" in kwargs:
        return args, kwargs | {"batch": _own_part(kwargs["batch"], split)}
    return (_own_part(args[0], split), *args[1:]), kwargs


def _own_part(batch: Batch, split: Split) -> Batch:
    split.length = batch.tokens_BS.shape[1]
    if not split.sequence:
        return batch
    part, split.features = sequence_part(batch, split.group.size(), split.group.rank())
    return part


def sequence_part(batch: Batch, ranks: int, rank: int) -> tuple[Batch, Tensor]:
    """Rows padded to a multiple of `ranks`, with the indices of this rank's positions.

    `tokens_BS`, `positions_3BS` and `doc_lens` stay whole, for attention and the embedding;
    `visual_index_M` and `tokens` count in the rank's [B, S / ranks]. Returned beside the
    batch: which of the batch's visual features are this rank's.
    """
    rows, length = batch.tokens_BS.shape
    padding = -length % ranks
    own = (length + padding) // ranks

    def local(index: Tensor) -> tuple[Tensor, Tensor]:
        row, position = index // length, index % length
        mine = (position // own == rank).nonzero().squeeze(-1)
        return (row * own + position - rank * own)[mine], mine

    tokens = batch.on_host.tokens
    index_V, mine = local(tokens.index_V)
    visual, features = local(batch.on_host.visual_index_M)
    batch = batch.with_indices(tokens=tokens.take(mine, index_V), visual_index_M=visual)
    if padding:
        batch.tokens_BS = F.pad(batch.tokens_BS, (0, padding))
        batch.positions_3BS = F.pad(batch.positions_3BS, (0, padding))
        batch.valid_BS = F.pad(batch.valid_BS, (0, padding))
        batch.doc_lens = _pad_documents(batch.doc_lens, length, padding)
    return batch, features.to(batch.tokens_BS.device, non_blocking=True)


def _pad_documents(doc_lens: list[int], length: int, padding: int) -> list[int]:
    """A document of padding behind each row."""
    padded, filled = [], 0
    for n in doc_lens:
        padded.append(n)
        filled += n
        if filled % length == 0:
            padded.append(padding)
    return padded


def _own_features(out: tuple[Tensor, list[Tensor]], split: Split) -> tuple[Tensor, list[Tensor]]:
    """Every rank has seen all pictures and needs the features of its positions."""

    def own(features_MD: Tensor) -> Tensor:
        return collectives.copy_to(features_MD, split.group).index_select(0, split.features)

    features_MD, deepstack = out
    return own(features_MD), [own(level) for level in deepstack]


# ---------------------------------------------------------------------------- the styles


def _column(module: nn.Module, split: Split) -> None:
    for name, _ in list(module.named_parameters()):
        shard_parameter(module, name, split.mesh, Shard(0))
    compute_locally(module, [Shard(0)])


def _row(linear: nn.Linear, split: Split) -> None:
    shard_parameter(linear, "weight", split.mesh, Shard(1))
    if linear.bias is not None:
        shard_parameter(linear, "bias", split.mesh, Replicate())
    first = split.group.rank() == 0

    def forward(x: Tensor) -> Tensor:
        out = F.linear(x, linear.weight.to_local(grad_placements=[Shard(1)]))
        if linear.bias is None:
            return out
        # The summands of all ranks are added: the bias is in the first one's.
        return out + linear.bias.to_local(grad_placements=[Partial()]) * first

    linear.forward = forward


def _pair(module: nn.Module, split: Split) -> None:
    """A module that begins with columns and ends in a row, on parts of a sequence."""
    _around(module, split.enter, split.leave)


def _pair_of_patches(module: nn.Module, split: Split) -> None:
    """The same in the vision tower, whose patches are not split."""
    _around(
        module,
        lambda x: collectives.copy_to(x, split.group),
        lambda x: collectives.reduce_from(x, split.group),
    )


def _around(module: nn.Module, enter: Callable, leave: Callable) -> None:
    forward = module.forward
    module.forward = lambda x, *args: leave(forward(enter(x), *args))


def _partial(module: nn.Module, split: Split) -> None:
    """Replicated parameters that meet other heads or other tokens on every rank."""
    for name, _ in list(module.named_parameters(recurse=False)):
        shard_parameter(module, name, split.mesh, Replicate())
    compute_locally(module, [Partial()])


def _sequence(module: nn.Module, split: Split) -> None:
    """A norm between the pairs."""
    if split.sequence:
        _partial(module, split)


def _experts(layer: MoE, split: Split, sequence: bool) -> None:
    """An MoE layer, on parts of a sequence already or on tokens that all ranks have."""
    for module in (layer.router, *(layer.shared.modules() if hasattr(layer, "shared") else ())):
        _partial(module, split)
    if sequence:
        return
    forward, group = layer.forward, split.group

    def run(x_TD: Tensor, tokens: Tokens) -> Tensor:
        shard_TD = shard_tokens(x_TD, group)
        mine = tokens.part(len(x_TD), group.size(), group.rank())
        return gather_tokens(forward(shard_TD, mine), len(x_TD), group)

    layer.forward = run


def shard_tokens(x_TD: Tensor, group: ProcessGroup) -> Tensor:
    """Of T replicated tokens, padded with zeros to a multiple of the ranks, this rank's."""
    return collectives.take_part(F.pad(x_TD, (0, 0, 0, -len(x_TD) % group.size())), 0, group)


def gather_tokens(x_TD: Tensor, num_tokens: int, group: ProcessGroup) -> Tensor:
    """The tokens of all ranks, replicated again, without the padding."""
    return collectives.join_parts(x_TD, 0, group)[:num_tokens]


def _embedding(embed: nn.Embedding, split: Split) -> None:
    """Each rank looks up its words and adds zeros for the others."""
    shard_parameter(embed, "weight", split.mesh, Shard(0))
    words = -(-embed.num_embeddings // split.group.size())
    first = words * split.group.rank()

    def forward(tokens_BS: Tensor) -> Tensor:
        weight_VD = embed.weight.to_local(grad_placements=[Shard(0)])
        local = tokens_BS - first
        here = (local >= 0) & (local < len(weight_VD))
        x_BSD = F.embedding(local.where(here, 0), weight_VD) * here.unsqueeze(-1)
        return split.leave(x_BSD)

    embed.forward = forward


def _head(lm_head: nn.Module, split: Split) -> None:
    """`head` gets all positions and the DTensor of the words."""
    shard_parameter(lm_head, "weight", split.mesh, Shard(0))
    forward = lm_head.forward

    def run(hidden_BSD: Tensor, *head) -> Tensor:
        return forward(split.enter(hidden_BSD)[:, : split.length], *head)

    lm_head.forward = run


STYLES: dict[str, Callable[[nn.Module, Split], None]] = {
    "column": _column,
    "row": _row,
    "pair": _pair,
    "pair_of_patches": _pair_of_patches,
    "partial": _partial,
    "sequence": _sequence,
    "embedding": _embedding,
    "head": _head,
}
