"""Placement against brute force and definitions; the layer with slots against itself without."""

from itertools import combinations, product

import pytest
import torch

from titan_vlm.models.init import init_weights
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.placement import (
    LogicalOrder,
    balanced,
    even_out,
    imbalance,
    linear,
    pack,
    place,
    rank_loads,
    replicate,
    replicate_experts,
    round_robin,
    set_slots,
    slot_tables,
)
from titan_vlm.models.moe.routing import Routing
from titan_vlm.models.moe.tokens import tokens_of


def skewed(experts: int, seed: int) -> torch.Tensor:
    """Pairs of each expert, a few experts with most of them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(experts, generator=generator).log().square() * 100).long()


def worst(load_E, logical_S, ranks) -> float:
    """Load of the most loaded rank, by definition: a loop over slots."""
    experts, totals = logical_S.tolist(), [0.0] * ranks
    for slot, e in enumerate(experts):
        totals[slot * ranks // len(experts)] += load_E[e].item() / experts.count(e)
    return max(totals)


def least_possible(loads: list[float], ranks: int) -> float:
    """Of all ways to give equally many experts to each rank, the smallest largest load."""
    if ranks == 1:
        return sum(loads)
    first, *others = range(len(loads))
    found = []
    for rest in combinations(others, len(loads) // ranks - 1):
        here = sum(loads[i] for i in (first, *rest))
        left = [loads[i] for i in others if i not in rest]
        found.append(max(here, least_possible(left, ranks - 1)))
    return min(found)


SIZES = [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3), (8, 2), (8, 4), (9, 3)]


@pytest.mark.parametrize(("experts", "ranks"), SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_balanced_holds_every_expert_once_and_keeps_its_bounds(experts, ranks, seed):
    load_E = skewed(experts, seed)
    logical_S = balanced(load_E, ranks)
    assert logical_S.sort().values.tolist() == list(range(experts))
    got = worst(load_E, logical_S, ranks)
    best = least_possible(load_E.tolist(), ranks)
    assert best - 1e-9 <= got <= (2 - 1 / ranks) * best + 1e-9
    assert got <= worst(load_E, linear(experts), ranks) + 1e-9


def test_balanced_is_near_the_best_on_average():
    ratios = []
    for (experts, ranks), seed in product(SIZES, range(20)):
        load_E = skewed(experts, seed) + 1
        best = least_possible(load_E.tolist(), ranks)
        ratios.append(worst(load_E, balanced(load_E, ranks), ranks) / best)
    assert sum(ratios) / len(ratios) < 1.02


def test_balanced_is_nearly_even_where_no_expert_is_too_hot():
    load_E = 100 + torch.arange(128) * 3  # linear: the last rank has 1.5 times the mean
    assert imbalance(rank_loads(load_E, linear(128), 8)) > 1.5
    assert imbalance(rank_loads(load_E, balanced(load_E, 8), 8)) < 1.001


@pytest.mark.parametrize("load", [0, 5])
def test_equal_loads_stay_where_they_are(load):
    assert torch.equal(balanced(torch.full((8,), load), 4), linear(8))


def test_no_swap_is_left_that_relieves_the_most_loaded_pack():
    for seed in range(20):
        load_I = skewed(12, seed).double()
        packs = pack(load_I, 3)
        totals = load_I[packs].sum(1)
        most = int(totals.argmax())
        for a, q, b in product(range(4), range(3), range(4)):
            moved = load_I[packs[most, a]] - load_I[packs[q, b]]
            after = max(totals[most] - moved, totals[q] + moved)
            assert q == most or after >= totals[most] - 1e-6


def test_a_swap_of_little_worth_is_not_made():
    load_I = torch.tensor([10.0, 8.2, 9.9, 8.0])  # 18.2 and 17.9
    start = torch.tensor([[0, 1], [2, 3]])
    assert torch.equal(even_out(start, load_I, worth=0.01), start)
    assert not torch.equal(even_out(start, load_I, worth=0.001), start)


def test_round_robin_deals_experts_to_ranks():
    assert round_robin(6, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert round_robin(1, 1).tolist() == [0]


def test_the_drawing():
    load_E = torch.tensor([6, 6, 2, 2])
    assert round_robin(4, 2).tolist() == [0, 2, 1, 3]
    assert balanced(load_E, 2).tolist() == [2, 1, 0, 3]
    six = balanced(load_E, 2, slots=6)
    assert six.tolist() == [2, 0, 1, 1, 0, 3]
    loads = [rank_loads(load_E, p, 2).tolist() for p in (linear(4), round_robin(4, 2), six)]
    assert loads == [[12, 4], [8, 8], [8, 8]]


# ---------------------------------------------------------------------------- redundant experts


def test_replicas_are_proportional_to_load():
    assert replicate(torch.tensor([600, 300, 200, 100]), 12).tolist() == [6, 3, 2, 1]
    assert replicate(torch.tensor([7]), 5).tolist() == [5]
    assert replicate(torch.zeros(3), 6).tolist() == [2, 2, 2]
    assert replicate(torch.tensor([0, 9, 0]), 5).tolist() == [1, 3, 1]


@pytest.mark.parametrize("seed", range(8))
def test_no_other_numbers_of_replicas_have_a_less_loaded_worst_one(seed):
    load_E, slots = skewed(4, seed), 9
    choices = [c for c in product(range(1, slots), repeat=4) if sum(c) == slots]
    best = min(max(x / n for x, n in zip(load_E.tolist(), c, strict=True)) for c in choices)
    replicas_E = replicate(load_E, slots)
    assert replicas_E.sum() == slots
    assert (load_E / replicas_E).max().item() == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_redundant_experts_lower_what_packing_alone_cannot(seed):
    load_E = skewed(16, seed)
    load_E[3] = load_E.sum()  # half of everything
    one_each = balanced(load_E, 8)
    more = balanced(load_E, 8, slots=24)
    assert len(more) == 24 and set(more.tolist()) == set(range(16))
    assert worst(load_E, one_each, 8) >= load_E[3]
    assert worst(load_E, more, 8) < 0.5 * load_E[3]
    expected = [worst(load_E, p, 8) / (load_E.sum().item() / 8) for p in (one_each, more)]
    assert [imbalance(rank_loads(load_E, p, 8)) for p in (one_each, more)] == pytest.approx(
        expected
    )


@pytest.mark.parametrize("slots", [16, 24])
def test_the_experts_of_a_group_stay_in_one_node(slots):
    experts, ranks, groups, nodes = 16, 8, 8, 2
    for seed in range(10):
        load_E = skewed(experts, seed)
        logical_S = balanced(load_E, ranks, slots, groups, nodes)
        node_of = [set(part.tolist()) for part in logical_S.view(nodes, -1)]
        assert node_of[0].isdisjoint(node_of[1])
        assert node_of[0] | node_of[1] == set(range(experts))
        for group in torch.arange(experts).view(groups, -1).tolist():
            assert set(group) <= node_of[0] or set(group) <= node_of[1]
        assert len({e // 2 for e in node_of[0]}) == groups // nodes
        # Groups to nodes are packed as experts to ranks are, with the same bound.
        of_groups = load_E.view(groups, -1).sum(1)
        nodes_load = rank_loads(load_E, logical_S, nodes)
        assert nodes_load.max() <= 1.5 * least_possible(of_groups.tolist(), nodes) + 1e-9


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"slots": 10}, "10 slots on 4 ranks"),
        ({"groups": 3}, "8 experts in 3 groups"),
        ({"groups": 1, "nodes": 2}, "1 groups on 2 nodes"),
        ({"groups": 8, "nodes": 8}, "4 ranks on 8 nodes"),
        ({"slots": 4}, "8 experts do not fit into 4 slots"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        balanced(torch.ones(8), 4, **numbers)


def test_no_load_at_all_is_balanced():
    assert imbalance(torch.zeros(4)) == 1.0


# ---------------------------------------------------------------------------- in the layer


def routing_of(experts: list[int], num_experts: int) -> Routing:
    pairs = torch.arange(len(experts))
    return Routing(pairs, torch.tensor(experts), torch.rand(len(experts)), num_experts)


def test_pairs_go_to_the_slot_that_holds_their_expert():
    logical_S = torch.tensor([2, 0, 3, 1])
    routing = routing_of([0, 3, 3, 1, 2], 4)
    placed = place(routing, *slot_tables(logical_S, 4))
    assert logical_S[placed.expert_ids_P].tolist() == [0, 3, 3, 1, 2]
    assert torch.equal(placed.weights_P, routing.weights_P)
    assert routing.counts_E.tolist() == [1, 1, 1, 2] and placed.counts_E.tolist() == [1, 1, 2, 1]


def test_pairs_are_dealt_to_the_replicas_of_their_expert_in_turn():
    logical_S = torch.tensor([1, 0, 1, 2, 1, 0])
    experts = [1, 0, 1, 1, 0, 1, 2, 0, 1]
    placed = place(routing_of(experts, 3), *slot_tables(logical_S, 3))
    assert placed.num_experts == 6
    assert placed.expert_ids_P.tolist() == [0, 1, 2, 4, 5, 0, 3, 1, 2]


def small_layer() -> MoE:
    layer = MoE(12, 10, 6, 2).double()
    init_weights(layer, 0, std=0.3)
    return layer


def run_layer(layer: MoE):
    """Output, and gradients by name."""
    x_TD = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out_TD = layer(
        x_TD.requires_grad_(), tokens_of([40], valid_T=(torch.arange(40) - 19).abs() < 17)
    )
    used = [p for p in layer.parameters() if p.requires_grad]
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(out_TD.sin().sum(), [x_TD, *used])
    return out_TD.detach(), dict(zip(["x", *names], grads, strict=True))


def test_a_placed_layer_is_the_same_layer():
    layer, placed = small_layer(), small_layer()
    logical_S = torch.tensor([3, 5, 0, 1, 4, 2])
    for weight in placed.experts.parameters():
        weight.data = weight.data[logical_S]
    set_slots(placed, *slot_tables(logical_S, 6))
    (out, grads), (placed_out, placed_grads) = run_layer(layer), run_layer(placed)
    torch.testing.assert_close(placed_out, out, rtol=1e-12, atol=1e-12)
    in_order = LogicalOrder({**placed_grads, "slots_E": placed.slots_E})
    assert set(in_order) == set(grads) and len(in_order) == len(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(in_order[name], grad, rtol=1e-12, atol=1e-12)
        assert torch.equal(LogicalOrder(in_order)[name], in_order[name])  # order it is only once
    assert torch.equal(layer.router.load_E, placed.router.load_E)  # by expert, not by slot


def test_redundant_experts_do_not_change_the_output():
    layer, more = small_layer(), small_layer()
    logical_S = balanced(torch.tensor([9, 1, 1, 5, 1, 1]), 5, slots=10)
    replicate_experts(more, logical_S)
    assert more.experts.down.shape[0] == 10
    torch.testing.assert_close(run_layer(more)[0], run_layer(layer)[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(more.router.load_E, layer.router.load_E)


def test_the_placement_is_saved_with_the_layer():
    layer = small_layer()
    assert "slots_E" not in layer.state_dict()
    set_slots(layer, *slot_tables(round_robin(6, 2), 6))
    set_slots(layer, *slot_tables(round_robin(6, 3), 6))  # and may change
    assert layer.state_dict()["slots_E"].tolist() == [0, 2, 4, 1, 3, 5]
