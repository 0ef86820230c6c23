"""Which expert lies in which slot, and the way from the one to the other.

Routers speak of E logical experts. Their weights lie in S slots, and rank r of n holds the slots
r*S/n ... (r+1)*S/n - 1. A placement is `logical_S`, the expert in each slot. Four experts, of which
0 and 1 get most pairs, on two ranks, with and without redundant experts (S = 6):

    load_E = [6 6 2 2]            rank 0       rank 1      load of the ranks
    linear                        0 1          2 3         12, 4
    round robin                   0 2          1 3         8, 8
    balanced                      2 1          0 3         8, 8
    balanced, S = 6               2 0 1        1 0 3       8, 8, and none above 3 in one slot

S = E in training, where one expert has one set of weights; redundant experts are for inference.
Placement is a matter of dispatch alone: routers, balance and metrics never see a slot. After
DeepSeek's load balancer (DeepSeek-V3, arXiv 2412.19437, section 3.4; github.com/deepseek-ai/EPLB).

E logical experts, S slots, n ranks, P pairs, I items, G groups of experts, M items of a pack
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from titan_vlm.models.layers.head import whole
from titan_vlm.models.moe.routing import Routing, count

# Part of the mean load; a swap that takes no more than this off the most loaded pack is roundoff.
ROUNDOFF = 1e-9


def linear(num_experts: int) -> Tensor:
    """logical_S: expert e in slot e, int64 [E]."""
    return torch.arange(num_experts)


def round_robin(num_experts: int, ranks: int) -> Tensor:
    """logical_S: expert e on rank e modulo n, int64 [E]; n divides E."""
    return torch.arange(num_experts).view(-1, ranks).t().flatten()


def balanced(
    load_E: Tensor, ranks: int, slots: int | None = None, groups: int = 1, nodes: int = 1
) -> Tensor:
    """logical_S: such that the ranks get pairs as evenly as swaps can make it, int64 [S].

    From the outside inwards: equally many groups to each node, redundant experts to the experts
    that need them most, equally many slots to each rank of a node. With one node and S = E no rank
    gets more than the most loaded one of `linear`, nor more than 2 - 1/n times what is possible.

    Args:
        load_E: pairs of each expert, measured.
        slots: S, a multiple of n; E if None.
        groups: G runs of E/G experts that stay together in one node (group-limited routing sends a
            token to few of them); a multiple of the nodes.
        nodes: of n / nodes ranks, of which each knows its neighbours.

    Raises:
        ValueError: numbers that do not divide, or fewer slots than experts.
    """
    experts = len(load_E)
    slots = experts if slots is None else slots
    divisions = {
        f"{experts} experts in {groups} groups": experts % groups,
        f"{groups} groups on {nodes} nodes": groups % nodes,
        f"{ranks} ranks on {nodes} nodes": ranks % nodes,
        f"{slots} slots on {ranks} ranks": slots % ranks,
    }
    if uneven := [what for what, rest in divisions.items() if rest]:
        raise ValueError(f"{uneven[0]}: not equally many each")
    if slots < experts:
        raise ValueError(f"{experts} experts do not fit into {slots} slots")
    load_E = load_E.to("cpu", torch.float64)
    members_GM = torch.arange(experts).view(groups, -1)
    here_S = []
    for groups_M in pack(load_E[members_GM].sum(1), nodes):
        here_E = members_GM[groups_M].flatten()
        replicas_E = replicate(load_E[here_E], slots // nodes)
        logical_I = here_E.repeat_interleave(replicas_E)
        load_I = (load_E[here_E] / replicas_E).repeat_interleave(replicas_E)
        here_S.append(logical_I[pack(load_I, ranks // nodes)].flatten())
    return torch.cat(here_S)


def replicate(load_E: Tensor, slots: int) -> Tensor:
    """replicas_E: how many of S >= E slots each expert gets, int64, one at least.

    Each slot more goes to the expert whose replicas have the most to do, which makes the most
    loaded replica as little loaded as it can be. Of equal ones to the one with fewer replicas.
    """
    loads, replicas = load_E.tolist(), [1] * len(load_E)
    for _ in range(slots - len(loads)):
        most = max(range(len(loads)), key=lambda e: (loads[e] / replicas[e], -replicas[e], -e))
        replicas[most] += 1
    return torch.tensor(replicas)


def pack(load_I: Tensor, packs: int) -> Tensor:
    """Items into equally large packs of loads as equal as swaps can make them, int64 [packs, M]."""
    return even_out(torch.arange(len(load_I)).view(packs, -1), load_I, ROUNDOFF)


def even_out(items_NM: Tensor, load_I: Tensor, worth: float) -> Tensor:
    """Packs of items (N rows of M), and swaps as long as one relieves the most loaded pack.

    Few items move, the most loaded pack never gets more, and at the end it has at most one item's
    load more than any other: for of two packs of equally many items, compared from the largest
    down, there is a pair whose swap would lessen any greater difference.

    Args:
        worth: a swap must take this part of the packs' mean load, > 0, off the most loaded one.
    """
    items_NM, load_I = items_NM.clone(), load_I.to("cpu", torch.float64)
    mean = load_I[items_NM].sum() / len(items_NM)
    while True:
        load_NM = load_I[items_NM]
        load_N = load_NM.sum(1)
        most = int(load_N.argmax())
        # What item a of that pack for item b of pack q takes off it, and adds to the other.
        moved_aqb = load_NM[most].view(-1, 1, 1) - load_NM
        relief_aqb = moved_aqb.minimum((load_N[most] - load_N).view(-1, 1) - moved_aqb)
        best = relief_aqb.argmax()
        if relief_aqb.flatten()[best] <= worth * mean:
            return items_NM
        a, q, b = torch.unravel_index(best, relief_aqb.shape)
        mine, other = items_NM[most, a].clone(), items_NM[q, b].clone()
        items_NM[most, a], items_NM[q, b] = other, mine


def rank_loads(load_E: Tensor, logical_S: Tensor, ranks: int) -> Tensor:
    """Pairs of each rank, float64 [n]; replicas share those of their expert equally."""
    replicas_E = count(logical_S, len(load_E))
    load_S = (load_E.to("cpu", torch.float64) / replicas_E)[logical_S]
    return load_S.view(ranks, -1).sum(1)


def imbalance(load_N: Tensor) -> float:
    """Largest load over mean load, 1 at best; also where there is no load at all."""
    return (load_N.max() / load_N.mean()).item() if load_N.any() else 1.0


# ---------------------------------------------------------------------------- in the layer


def slot_tables(logical_S: Tensor, num_experts: int) -> tuple[Tensor, Tensor | None]:
    """The way back, `slots_S` and `replicas_E`, for `place`.

    slots_S      the slots of expert 0, then those of expert 1, and so on; with S = E one each
    replicas_E   how many each has; None with S = E
    """
    slots_S = logical_S.argsort(stable=True)
    return slots_S, count(logical_S, num_experts) if len(logical_S) > num_experts else None


def place(routing: Routing, slots_S: Tensor | None, replicas_E: Tensor | None = None) -> Routing:
    """The same pairs, by slot instead of by expert (num_experts = S); None: a slot is its expert.

    The pairs of an expert are dealt to its replicas in turn. Nobody waits for a device.
    """
    if slots_S is None:
        return routing
    experts_P = routing.expert_ids_P
    if replicas_E is not None:
        first_E = replicas_E.cumsum(0) - replicas_E
        turn_P = _turns(experts_P, routing.counts_E) % replicas_E[experts_P]
        experts_P = first_E[experts_P] + turn_P
    return replace(routing, expert_ids_P=slots_S[experts_P], num_experts=len(slots_S))


def _turns(experts_P: Tensor, counts_E: Tensor) -> Tensor:
    """How many pairs of the same expert come before each pair."""
    order_P = experts_P.argsort(stable=True)
    before_E = counts_E.cumsum(0) - counts_E
    turns = torch.arange(len(order_P), device=order_P.device) - before_E[experts_P[order_P]]
    return torch.empty_like(order_P).index_copy_(0, order_P, turns)


def set_slots(layer: nn.Module, slots_S: Tensor, replicas_E: Tensor | None = None) -> None:
    """Let an MoE layer, whose weights lie so, place its pairs; saved with the model."""
    for name, table in (("slots_E", slots_S), ("replicas_E", replicas_E)):
        if table is not None:
            layer.__dict__.pop(name, None)  # what was None becomes a buffer
            layer.register_buffer(name, table.to(layer.router.load_E.device))


@torch.no_grad()
def replicate_experts(layer: nn.Module, logical_S: Tensor) -> None:
    """Give an MoE layer with whole experts in logical order those of `logical_S` in its slots.

    For inference: replicas trained on would drift apart. Comes before experts are spread over
    ranks, of which S must be a multiple.
    """
    for name, weight in list(layer.experts.named_parameters()):
        slots = weight[logical_S.to(weight.device)]
        layer.experts.register_parameter(name, nn.Parameter(slots, requires_grad=False))
    set_slots(layer, *slot_tables(logical_S, layer.router.num_experts))


# ---------------------------------------------------------------------------- outside of it


class LogicalOrder(Mapping[str, Tensor]):
    """A state by name in which tensors of experts (S = E) are whole and in the order of experts.

    They are put in order when they are asked for, by the `slots_E` beside them in `state`, which
    are in this one no more; any other tensor is passed on. Sharded ones are gathered: every rank
    must ask.
    """

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        if _is_placement(name):
            raise KeyError(name)
        tensor = self.state[name]
        layer, experts, _ = name.rpartition("experts.")
        slots_E = self.state.get(f"{layer}slots_E") if experts else None
        if slots_E is None:
            return tensor
        tensor = whole(tensor)
        return tensor[slots_E.to(tensor.device)]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.state if not _is_placement(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _is_placement(name: str) -> bool:
    return name.rpartition(".")[2] == "slots_E"
