"""Experts change ranks while a run trains: their weights and optimizer states move with them.

`models/moe/placement.py` says which slot an expert should lie in; here the rows of every tensor of
experts are permuted between the ranks, in place. Slots 0 1 | 2 3 of two ranks:

    logical_S      0 1 | 2 3         experts 0 and 1 get most pairs
    wanted         2 1 | 0 3
    source_S       2 1 | 0 3         the slot that each slot's new content lies in now
    rank 0         keeps slot 1, sends slot 0 to slot 2
    rank 1         keeps slot 3, sends slot 2 to slot 0

Of a tensor that FSDP2 has sharded as well, a rank holds its slots of some columns, or some of the
slots of its expert rank: it exchanges with the ranks that hold the same columns. With replicas
(HSDP) every replica does so for itself.

The mathematics does not change: `slots_E` of the layer turns with the weights, and is saved with
them, so that any mesh can read a checkpoint.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_vlm import mesh as views
from titan_vlm.mesh import Mesh
from titan_vlm.models.moe.layer import moe_layers
from titan_vlm.models.moe.placement import (
    even_out,
    imbalance,
    linear,
    rank_loads,
    round_robin,
    set_slots,
    slot_tables,
)
from titan_vlm.models.shards import local_part

logger = logging.getLogger("titan_vlm")
# An expert is three tensors of its size on the way; a swap must take a hundredth of the mean load
# off the most loaded rank.
WORTH = 0.01

Leaf = tuple[str, str]  # a layer and one of its experts' parameters

# S slots, E experts: as many


@dataclass(frozen=True)
class Moved:
    """What a change of placement did.

    bytes     sent from one rank to another, by all ranks of this stage
    experts   that changed ranks, of all layers of this stage
    before    largest / mean load of the ranks, of the worst layer
    after     the same, had the pairs come to the new placement
    """

    bytes: int
    experts: int
    before: float
    after: float


def register(model: nn.Module) -> None:
    """Give each MoE layer that has no placement the linear one; from now on it is saved with it."""
    for layer in moe_layers(model).values():
        if layer.slots_E is None:
            experts = layer.router.num_experts
            set_slots(layer, *slot_tables(linear(experts), experts))


def arrange(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, kind: str) -> int:
    """Move the experts of each layer that has a placement, from wherever they lie.

    To be called by every rank. With one rank for all experts nothing happens.

    Args:
        kind: "linear" or "round_robin".

    Returns:
        Bytes sent from rank to rank, by all ranks of this stage.
    """
    ranks = views.size(mesh.expert)
    if ranks == 1:
        return 0
    wanted = {
        name: linear(layer.router.num_experts)
        if kind == "linear"
        else round_robin(layer.router.num_experts, ranks)
        for name, layer in moe_layers(model).items()
        if layer.slots_E is not None
    }
    return _move(model, optimizer, mesh, wanted)


def rebalance(
    model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, loads: Mapping[str, Tensor]
) -> Moved:
    """Swap experts between ranks until the pairs of `loads` would be as even as swaps make them.

    To be called by every rank after `optimizer.step` and `zero_grad`: gradients do not move. Every
    layer has a placement (`register`). With one rank for all experts nothing happens.

    Args:
        loads: pairs of each expert, summed over all ranks, by layer as `moe_layers` names them;
            of this stage at least.
    """
    ranks = views.size(mesh.expert)
    if ranks == 1:
        return Moved(0, 0, 1.0, 1.0)
    wanted, before, after, experts = {}, [1.0], [1.0], 0
    for name, layer in moe_layers(model).items():
        load_E = loads[name]
        now_NM = layer.slots_E.cpu().argsort().view(ranks, -1)
        new_NM = even_out(now_NM, load_E, WORTH)
        before.append(imbalance(rank_loads(load_E, now_NM.flatten(), ranks)))
        after.append(imbalance(rank_loads(load_E, new_NM.flatten(), ranks)))
        now_E, new_E = (logical_NM.flatten().argsort() for logical_NM in (now_NM, new_NM))
        experts += int((now_E // now_NM.shape[1] != new_E // now_NM.shape[1]).sum())
        wanted[name] = new_NM.flatten()
    sent = _move(model, optimizer, mesh, wanted)
    moved = Moved(sent, experts, max(before), max(after))
    logger.info(
        "placement: %d experts change ranks, %.1f MB sent; load of the fullest rank %.2f -> %.2f "
        "of the mean",
        moved.experts,
        moved.bytes / 1e6,
        moved.before,
        moved.after,
    )
    return moved


@torch.no_grad()
def copy_first_expert(
    model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, names: Sequence[str]
) -> None:
    """Make all experts of the layers `names` copies of their expert 0, with the optimizer's state.

    To be called by every rank, without gradients. Each rank gets one expert and copies it into all
    of its slots.
    """
    layers = {name: layer for name, layer in moe_layers(model).items() if name in names}
    if not layers:
        return
    group = mesh.tokens.get_group()
    parameters = _expert_parameters(layers)
    held = _gather_held(parameters, group)
    for (name, leaf), parameter in parameters.items():
        layer, here = layers[name], [where[name, leaf] for where in held]
        first = 0 if layer.slots_E is None else int(layer.slots_E[0])
        source_S = list(range(layer.router.num_experts))
        for slots, *_ in here:
            if slots.start < slots.stop:
                source_S[slots.start] = first
        peers = _peers(here, mesh, group.rank())
        for tensor in _of_experts(parameter, optimizer):
            part, _ = local_part(tensor)
            _permute(part, source_S, peers, group)
            part[1:] = part[:1]


# ---------------------------------------------------------------------------- moving


@torch.no_grad()
def _move(
    model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, wanted: Mapping[str, Tensor]
) -> int:
    """Let each layer's experts lie as `wanted` (logical_S by layer); bytes sent, by all ranks."""
    layers = moe_layers(model)
    sources = {
        # Slot s is to hold expert wanted[s], which lies in slot slots_E[wanted[s]] now.
        name: layers[name].slots_E.cpu()[logical_S]
        for name, logical_S in wanted.items()
    }
    sources = {n: s for n, s in sources.items() if not torch.equal(s, torch.arange(len(s)))}
    if not sources:
        return 0
    parameters = _expert_parameters({name: layers[name] for name in sources})
    assert all(p.grad is None for p in parameters.values()), "gradients would be of other experts"
    group = mesh.tokens.get_group()
    held = _gather_held(parameters, group)
    sent = 0
    for key, parameter in parameters.items():
        peers = _peers([where[key] for where in held], mesh, group.rank())
        for tensor in _of_experts(parameter, optimizer):
            sent += _permute(local_part(tensor)[0], sources[key[0]].tolist(), peers, group)
    for name in sources:
        slots_S, _ = slot_tables(wanted[name], len(wanted[name]))
        layers[name].slots_E.copy_(slots_S)
    total = torch.tensor(sent, device=mesh.root.device_type)
    dist.all_reduce(total, group=group)
    return int(total)


def _expert_parameters(layers: Mapping[str, nn.Module]) -> dict[Leaf, nn.Parameter]:
    return {
        (name, leaf): parameter
        for name, layer in layers.items()
        for leaf, parameter in layer.experts.named_parameters()
    }


def _gather_held(
    parameters: Mapping[Leaf, nn.Parameter], group: dist.ProcessGroup
) -> list[dict[Leaf, tuple[slice, ...]]]:
    """Which part of each parameter every rank of the group holds."""
    held: list[dict] = [{}] * group.size()
    mine = {key: local_part(parameter)[1] for key, parameter in parameters.items()}
    dist.all_gather_object(held, mine, group=group)
    return held


def _of_experts(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The parameter and what the optimizer keeps of the same shape; its count of steps is not."""
    yield parameter
    for state in optimizer.state.get(parameter, {}).values():
        if isinstance(state, Tensor) and state.shape == parameter.shape:
            yield state


def _peers(held: list[tuple[slice, ...]], mesh: Mesh, rank: int) -> list[range]:
    """The slots that each rank of `mesh.tokens` can exchange with `rank`; none where it cannot.

    Args:
        held: which part of the whole each of them holds.
    """
    replica_size = len(held) // mesh.degrees["dp_replicate"]  # replicas are the outermost axis
    return [
        range(where[0].start, where[0].stop)
        if other // replica_size == rank // replica_size and where[1:] == held[rank][1:]
        else range(0)
        for other, where in enumerate(held)
    ]


def _permute(
    part: Tensor, source_S: list[int], peers: list[range], group: dist.ProcessGroup
) -> int:
    """Fill each of this rank's slots from its source, in place; bytes sent to others.

    Args:
        part: this rank's slots, in rows.
        source_S: slot s gets what lies in slot source_S[s].
        peers: slots of each rank; those of this one are the rows of `part`.
    """
    here, others = peers[group.rank()], list(peers)
    others[group.rank()] = range(0)  # what stays needs no message
    # Both sides take the slots in ascending order of where their content goes.
    sent = [[source_S[s] for s in there if source_S[s] in here] for there in others]
    arriving = [[s for s in here if source_S[s] in there] for there in others]
    stay = [s for s in here if source_S[s] in here]
    rows = {slot: row for row, slot in enumerate(here)}

    out = part[_row_index(rows, sum(sent, []), part)]
    kept = part[_row_index(rows, [source_S[s] for s in stay], part)]
    arrived = part.new_empty(sum(map(len, arriving)), *part.shape[1:])
    # The experts that change ranks, each to the one rank that gets its slot.
    dist.all_to_all_single(arrived, out, [*map(len, arriving)], [*map(len, sent)], group=group)
    part[_row_index(rows, stay, part)] = kept
    part[_row_index(rows, sum(arriving, []), part)] = arrived
    return out.numel() * out.element_size()


def _row_index(rows: Mapping[int, int], slots: list[int], part: Tensor) -> Tensor:
    index = [rows[slot] for slot in slots]
    return torch.tensor(index, dtype=torch.int64, device=part.device)
