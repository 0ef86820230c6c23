"""Dispatchers between ranks against one rank with all experts, on routings meant to break them."""

import pytest
import torch

from titan_vlm import distributed
from titan_vlm.models.init import init_weights
from titan_vlm.models.moe.exchange import AllGatherDispatcher, AllToAllDispatcher
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.routing import Routing
from titan_vlm.parallel.tensor import gather_tokens, shard_tokens

WIDTH, HIDDEN, EXPERTS, TOP_K = 12, 10, 8, 2
DISPATCHERS = {"all_to_all": AllToAllDispatcher, "allgather": AllGatherDispatcher}


def everywhere(tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices


# What the ranks 0 and 1 hold: [T, K] experts of each token.
ROUTINGS = {
    "ordinary": (everywhere(16), everywhere(16)),
    "a prime number of tokens": (everywhere(13), everywhere(7)),
    "no token at all": (everywhere(0), everywhere(0)),
    "one rank without tokens": (everywhere(0), everywhere(5)),
    "one token": (everywhere(1), everywhere(0)),
    "all to one expert": (torch.full((9, 1), 3), torch.full((4, 1), 3)),
    "none to the experts of a rank": (torch.full((9, 1), 6), torch.full((4, 1), 7)),
}


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_outputs_and_gradients_are_those_of_one_rank(world, dispatcher, name):
    experts_TK = ROUTINGS[name]
    results = world.run(2, layer_on_two_ranks, dispatcher, experts_TK)
    inputs = [inputs_of(rank, experts) for rank, experts in enumerate(experts_TK)]
    layer = whole_layer()
    joined = Routing(
        token_ids_P=torch.cat([inputs[0][1], inputs[1][1] + len(inputs[0][0])]),
        expert_ids_P=torch.cat([experts.flatten() for experts in experts_TK]),
        weights_P=torch.cat([inputs[0][2], inputs[1][2]]).requires_grad_(),
        num_experts=EXPERTS,
    )
    x_TD = torch.cat([inputs[0][0], inputs[1][0]]).requires_grad_()
    rows, state = layer.dispatcher.dispatch(x_TD, joined)
    y_TD = layer.dispatcher.combine(layer.experts(rows, state.layout), state)
    (y_TD * y_TD).sum().backward()

    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([r["y"] for r in results]), y_TD, **close)
    torch.testing.assert_close(torch.cat([r["x"] for r in results]), x_TD.grad, **close)
    torch.testing.assert_close(
        torch.cat([r["weights"] for r in results]), joined.weights_P.grad, **close
    )
    for parameter in ("gate_up", "down"):
        ours = torch.cat([r[parameter] for r in results])
        torch.testing.assert_close(ours, getattr(layer.experts, parameter).grad, **close)


def whole_layer() -> MoE:
    layer = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K).double()
    init_weights(layer, 0, std=0.3)
    return layer


def inputs_of(rank, experts_TK):
    """[T, D] tokens, token and weight of each pair."""
    generator = torch.Generator().manual_seed(rank)
    tokens, pairs = experts_TK.shape[0], experts_TK.numel()
    x_TD = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=generator)
    weights_P = torch.rand(pairs, dtype=torch.float64, generator=generator)
    return x_TD, torch.arange(tokens).repeat_interleave(experts_TK.shape[1]), weights_P


def layer_on_two_ranks(dispatcher, experts_TK):
    import torch.distributed as dist

    distributed.start("cpu")
    rank = dist.get_rank()
    layer = whole_layer()
    for name, parameter in list(layer.experts.named_parameters()):
        part = parameter.detach().chunk(2)[rank].clone()
        layer.experts.register_parameter(name, torch.nn.Parameter(part))
    layer.dispatcher = DISPATCHERS[dispatcher](dist.group.WORLD)
    x_TD, tokens_P, weights_P = inputs_of(rank, experts_TK[rank])
    x_TD.requires_grad_()
    weights_P.requires_grad_()
    routing = Routing(tokens_P, experts_TK[rank].flatten(), weights_P, EXPERTS)
    rows, state = layer.dispatcher.dispatch(x_TD, routing)
    y_TD = layer.dispatcher.combine(layer.experts(rows, state.layout), state)
    (y_TD * y_TD).sum().backward()
    return {
        "y": y_TD.detach(),
        "x": x_TD.grad,
        "weights": weights_P.grad,
        "gate_up": layer.experts.gate_up.grad,
        "down": layer.experts.down.grad,
    }


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8])
def test_replicated_tokens_are_padded_sliced_and_restored(world, tokens):
    """On three ranks: each gets as many, together they are the tokens and zeros."""
    results = world.run(3, round_trip, tokens)
    x_TD = torch.arange(tokens * 2, dtype=torch.float64).view(tokens, 2)
    joined = torch.cat([r["shard"] for r in results])
    assert len({len(r["shard"]) for r in results}) == 1
    assert len(joined) == -(-tokens // 3) * 3
    assert torch.equal(joined[:tokens], x_TD) and not joined[tokens:].any()
    for result in results:
        assert torch.equal(result["back"], x_TD * 3)
        assert torch.equal(result["gradient"], torch.full_like(x_TD, 3.0))


def round_trip(tokens):
    import torch.distributed as dist

    distributed.start("cpu")
    x_TD = torch.arange(tokens * 2, dtype=torch.float64).view(tokens, 2).requires_grad_()
    shard = shard_tokens(x_TD, dist.group.WORLD)
    back = gather_tokens(shard * 3, tokens, dist.group.WORLD)
    back.sum().backward()
    return {"shard": shard.detach(), "back": back.detach(), "gradient": x_TD.grad}


def test_the_shared_expert_computes_while_rows_travel_in_both_directions(world):
    """And output and gradients are those of an exchange that is waited for."""
    for result in world.run(2, shared_expert_on_two_ranks):
        # Forward the rows go back to their tokens, backward their gradients to the experts.
        assert result["events"] == ["leave", "shared", "arrive", "leave", "shared grad", "arrive"]
        for ours, theirs in zip(result["overlapped"], result["plain"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def shared_expert_on_two_ranks():
    import torch.distributed as dist

    from titan_vlm.models.moe.config import MoEConfig
    from titan_vlm.models.moe.exchange import _Journey
    from titan_vlm.models.moe.tokens import tokens_of

    distributed.start("cpu")
    rank, events = dist.get_rank(), []
    layer = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K, MoEConfig(shared_width=16)).double()
    init_weights(layer, 0, std=0.3)
    for name, parameter in list(layer.experts.named_parameters()):
        part = parameter.detach().chunk(2)[rank].clone()
        layer.experts.register_parameter(name, torch.nn.Parameter(part))
    layer.dispatcher = AllToAllDispatcher(dist.group.WORLD)
    x_TD = inputs_of(rank, everywhere(13))[0].requires_grad_()

    def gradients(out_TD):
        parameters = [x_TD, *layer.parameters()]
        return [out_TD.detach(), *torch.autograd.grad(out_TD.square().sum(), parameters)]

    shared, begin, end = layer.shared, _Journey.begin, _Journey.end
    del layer.shared
    plain = layer(x_TD, tokens_of([13])) + shared(x_TD)
    layer.shared = shared
    plain = gradients(plain)
    _Journey.begin = lambda *args: events.append("leave") or begin(*args)
    _Journey.end = lambda *args: events.append("arrive") or end(*args)
    shared.register_forward_hook(lambda *_: events.append("shared"))
    shared.mlp.down.register_full_backward_hook(lambda *_: events.append("shared grad"))
    try:
        overlapped = gradients(layer(x_TD, tokens_of([13])))
    finally:
        _Journey.begin, _Journey.end = begin, end
    return {"events": events, "plain": plain, "overlapped": overlapped}
