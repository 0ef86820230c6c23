"""A router whose tokens are spread over ranks, every other token on each, against one that has all:
what it compares, counts and balances crosses ranks."""

import pytest
import torch

from tests.routing_cases import LENS, hidden, pairs, router, tokens

SETTINGS = {
    "expert choice": {"router": "expert_choice", "capacity_factor": 1.0, "normalize": False},
    "expert choice in chunks": {"router": "expert_choice", "capacity_factor": 1.0, "ec_chunk": 6},
    "capacity of a sequence": {"capacity_factor": 0.6, "min_capacity": 1},
    "capacity by score": {"capacity_factor": 0.6, "min_capacity": 1, "drop": "score"},
    "capacity of a batch": {"capacity_factor": 0.6, "min_capacity": 1, "capacity_scope": "batch"},
    "batch by score": {
        "capacity_factor": 0.6,
        "min_capacity": 1,
        "capacity_scope": "batch",
        "drop": "score",
    },
    "losses": {
        "score": "sigmoid",
        "aux_loss": 0.3,
        "sequence_loss": 0.5,
        "importance_loss": 0.2,
        "z_loss": 0.1,
        "bias_update": "sign",
    },
    "learned noise": {
        "router": "noisy_topk",
        "score": "softmax_topk",
        "cv_importance": 0.3,
        "cv_load": 0.4,
    },
    "jitter": {"noise": "jitter", "noise_eps": 0.3},
    "chance": {"router": "random"},
    "thresholds": {"router": "threshold"},
    "quantile": {"score": "sigmoid", "bias_update": "quantile"},
}


@pytest.mark.parametrize("kind", ["random", "hot", "ties"])
@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_choose_count_and_learn_as_one_process(world, name, kind):
    ranks = world.run(2, parts_of, SETTINGS[name], kind)
    for case, *results in zip(LENS, *ranks, strict=True):
        whole = run(SETTINGS[name], case, kind, ranks=1, rank=0)
        made = [pair for result in results for pair in result["pairs"]]
        assert sorted(made) == sorted(whole["pairs"])
        for key in ("x", "weight", "load", "sums", "pending"):
            joined = sum(result[key] for result in results)
            torch.testing.assert_close(joined, whole[key], rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize(
    ("name", "reductions", "gathers"),
    [
        ("expert choice", 1, 1 + 3),  # lengths; then group, score, place
        ("capacity of a sequence", 1, 1 + 2),
        ("batch by score", 1, 1 + 4),
        ("expert choice of a batch that learns", 2, 1 + 3),
        ("learned noise with drops", 2, 1 + 2),
    ],
)
def test_lengths_are_exchanged_once_and_nothing_in_a_recomputation(
    world, name, reductions, gathers
):
    settings = COUNTED.get(name) or SETTINGS[name]
    for made, again in world.run(2, exchanges, settings):
        assert made == {"all_reduce": reductions, "all_gather": gathers}
        assert again == {}


COUNTED = {
    "expert choice of a batch that learns": {
        "router": "expert_choice",
        "capacity_factor": 1.0,
        "z_loss": 0.1,
    },
    "learned noise with drops": {
        "router": "noisy_topk",
        "score": "softmax_topk",
        "cv_load": 0.4,
        "capacity_factor": 0.6,
        "min_capacity": 1,
    },
}


def exchanges(settings):
    """How often each collective is called by a router's forward pass, and by its second one."""
    from collections import Counter

    import torch.distributed as dist
    from torch.utils.checkpoint import checkpoint

    from titan_vlm import collectives, distributed
    from titan_vlm.parallel.expert import Peers

    distributed.start("cpu")
    case, calls = "three documents and padding", Counter()
    made, of, x_TD = router(**settings), tokens(case), hidden(case)
    made.sequence_peers = made.batch_peers = Peers(dist.group.WORLD)
    mine = (torch.arange(len(of)) % 2 == dist.get_rank()).nonzero().squeeze(-1)
    part = of.take(mine, of.index_V[mine])

    def counted(name):
        call = getattr(collectives, name)

        def run(*args):
            calls[name] += 1
            return call(*args)

        return run

    def forward(x_TD):
        return made(x_TD, part).weights_P.square().sum()

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather"):
            patch.setattr(collectives, name, counted(name))
        loss = checkpoint(forward, x_TD, use_reentrant=False)
        first = dict(calls)
        calls.clear()
        loss.backward()
        again = dict(calls)
    plain = x_TD.grad.clone()
    x_TD.grad = None
    forward(x_TD).backward()
    assert torch.equal(plain, x_TD.grad)
    return first, again


def parts_of(settings, kind):
    import torch.distributed as dist

    from titan_vlm import distributed

    distributed.start("cpu")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    return [run(settings, case, kind, ranks, rank) for case in LENS]


def run(settings, case, kind, ranks, rank):
    """A router of one rank; tokens keep the numbers they have in the whole."""
    made, of, x_TD = router(**settings), tokens(case), hidden(case, kind)
    if ranks > 1:
        import torch.distributed as dist

        from titan_vlm.parallel.expert import Peers

        made.sequence_peers = made.batch_peers = Peers(dist.group.WORLD)
    mine = (torch.arange(len(of)) % ranks == rank).nonzero().squeeze(-1)
    routing = made(x_TD, of.take(mine, of.index_V[mine]))
    routing.weights_P.square().sum().backward()
    steering = made.steering
    zeros = torch.zeros(1)
    return {
        "pairs": pairs(routing),
        "x": x_TD.grad if x_TD.grad is not None else torch.zeros_like(x_TD),
        "weight": made.weight.grad if made.weight.grad is not None else zeros,
        "load": made.load_E,
        "sums": made.sums,
        "pending": steering.pending if steering is not None else zeros,
    }
