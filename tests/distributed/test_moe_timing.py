"""What exchanges cost, on each rank and over all of them."""

import json
import time

import pytest
import torch
import torch.distributed as dist

from tests.small_run import run, small_config
from titan_vlm import distributed, train
from titan_vlm.models.init import init_weights
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.exchange import AllGatherDispatcher, AllToAllDispatcher
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.timing import COUNTS
from titan_vlm.models.moe.tokens import tokens_of
from titan_vlm.parallel.expert import Peers
from titan_vlm.training import routing

WIDTH, EXPERTS, TOP_K, NUMBER = 12, 8, 2, 8  # bytes of a float64 or int64
DISPATCHERS = {"all_to_all": AllToAllDispatcher, "allgather": AllGatherDispatcher}


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_an_all_to_all_counts_what_leaves_the_rank(world, shared):
    for rank, (times, counts, chosen) in enumerate(world.run(2, layer, "all_to_all", shared)):
        theirs = range(EXPERTS // 2 * (1 - rank), EXPERTS // 2 * (2 - rank))
        away = sum(expert in theirs for expert in chosen[rank])
        here = sum(expert not in theirs for expert in chosen[1 - rank])
        # Rows and weights to the other rank, outputs back from here; the gradients of all three
        # the other way; and how many for each of its experts.
        forward = away * (WIDTH + 1) + here * WIDTH + EXPERTS // 2
        backward = here * (WIDTH + 1) + away * WIDTH
        assert counts["a2a_bytes"] == (forward + backward) * NUMBER
        assert counts["a2a_calls"] == 4 + 3
        assert 0 < times[1] < times[0]


def test_an_all_gather_counts_what_it_sends_to_each_other_rank(world):
    tokens, pairs = (11, 7), (11 * TOP_K, 7 * TOP_K)
    for times, counts, _ in world.run(2, layer, "allgather", False):
        # Tokens and weights with their gradients, numbers of tokens and experts without; then the
        # outputs of the other rank's tokens and their gradients; and how many there are, twice.
        numbers = 2 * max(tokens) * WIDTH + 2 * max(pairs) + 2 * max(pairs)
        numbers += 2 * max(tokens) * WIDTH + 2
        assert counts["a2a_bytes"] == numbers * NUMBER
        assert counts["a2a_calls"] == 6 + 3
        assert 0 < times[1] < times[0]


def layer(dispatcher, shared):
    """Clock of a rank that has 11 tokens, or 7; and the experts that each rank's tokens chose."""
    distributed.start("cpu")
    rank = dist.get_rank()
    layer = make_layer(rank, dispatcher, shared)
    x_TD = inputs(rank).requires_grad_()
    layer(x_TD, tokens_of([len(x_TD)])).sum().backward()
    times, counts = layer.clock.read()
    chosen = []
    for other in range(2):
        logits = inputs(other) @ layer.router.weight.detach().T
        chosen.append(logits.topk(TOP_K).indices.flatten().tolist())
    return times, dict(zip(COUNTS, counts, strict=True)), chosen


def make_layer(rank, dispatcher, shared):
    layer = MoE(WIDTH, 10, EXPERTS, TOP_K, MoEConfig(shared_width=6 * shared)).double()
    init_weights(layer, 0, std=0.3)
    for name, parameter in list(layer.experts.named_parameters()):
        part = parameter.detach().chunk(2)[rank].clone()
        layer.experts.register_parameter(name, torch.nn.Parameter(part))
    layer.router.batch_peers = Peers(dist.group.WORLD)
    layer.dispatcher = DISPATCHERS[dispatcher](dist.group.WORLD)
    return layer


def inputs(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn((11, 7)[rank], WIDTH, dtype=torch.float64, generator=generator)


def test_waiting_for_a_slow_rank_is_time_of_the_exchange(world):
    waited = [times[1] for times, _ in world.run(2, late)]
    assert waited[1] < 150 and waited[0] > waited[1] + 150


def late():
    distributed.start("cpu")
    rank = dist.get_rank()
    layer = make_layer(rank, "all_to_all", False)
    experts = layer.experts.forward

    def slow(*args):
        time.sleep(0.3 * rank)
        return experts(*args)

    layer.experts.forward = slow
    dist.barrier()
    x_TD = inputs(rank)
    layer(x_TD, tokens_of([len(x_TD)]))
    return layer.clock.read()


@pytest.mark.parametrize(
    ("ranks", "axes"),
    [(2, {"parallelism__ep": "2"}), (2, {"parallelism__pp": "2"}), (4, {"parallelism__tp": "2"})],
    ids=["ep", "pp", "dp and tp"],
)
def test_figures_are_of_the_ranks_that_have_the_layer(world, tmp_path, ranks, axes):
    """Each rank's clocks say its number; all ranks learn the same."""
    results = world.run(ranks, collected, tmp_path, axes)
    for figures, _ in results:
        assert figures == results[0][0]
    for name, (found, timing) in results[0][0].items():
        owners = [rank for rank, (_, here) in enumerate(results) if name in here]
        assert len(owners) == (1 if "parallelism__pp" in axes else ranks)
        assert found == [[rank + 1.0 for rank in owners], [10.0 * (rank + 1) for rank in owners]]
        mean = sum(rank + 1 for rank in owners) / len(owners)
        assert timing["moe_ms"] == mean and timing["moe_ms_max"] == owners[-1] + 1
        assert timing["a2a_ms"] == 10 * mean and timing["a2a_ms_max"] == 10 * (owners[-1] + 1)
        assert timing["moe_calls"] == 2 and timing["a2a_calls"] == 3
        assert timing["a2a_bytes"] == 100 * mean
        assert timing["padding"] == pytest.approx(1 - 3 / 4)


def collected(output, axes):
    prepared = train.prepare(small_config(output, **axes))
    here = routing.moe_layers(prepared.model)
    number = dist.get_rank() + 1
    for layer in here.values():
        counts = [2, 3, 100 * number, 3 * number, 4 * number]
        layer.clock.read = lambda counts=counts: ([number, 10 * number], counts)
    figures = routing.collect(prepared.model, prepared.moe_layers, prepared.mesh, prepared.device)
    assert list(figures) == list(prepared.moe_layers) and len(figures) > 1
    # Along tp and dp the order of the ranks of `tokens` is that of the world here.
    return {n: ([f.moe_ms, f.a2a_ms], f.timing()) for n, f in figures.items()}, list(here)


def test_a_run_over_two_ranks_reports_its_exchanges(world, tmp_path):
    world.run(2, run_small, tmp_path, {"parallelism__ep": "2", "training__steps": "2"})
    for line in (tmp_path / "moe.jsonl").read_text().splitlines():
        for figures in json.loads(line)["layers"].values():
            assert 0 < figures["a2a_ms"] <= figures["a2a_ms_max"]
            assert figures["a2a_ms"] < figures["moe_ms"] <= figures["moe_ms_max"]
            assert 0 < figures["a2a_share"] < figures["moe_share"] < 1
            assert figures["a2a_bytes"] > 0 and 0 <= figures["padding"] < 1
            assert figures["a2a_calls"] == 7 * figures["moe_calls"]


def run_small(output, changes):
    return run(output, **changes)
