"""The MoE layer against a loop over tokens and experts, written from its definition."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from titan_vlm.models.init import init_weights
from titan_vlm.models.moe.dispatcher import LocalDispatcher
from titan_vlm.models.moe.experts import Experts, WeightedSwiGLU, _EachRow
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.layout import ALIGN, ALIGN_WIDE, make_layout
from titan_vlm.models.moe.routing import Routing
from titan_vlm.models.moe.tokens import tokens_of

WIDTH, HIDDEN, EXPERTS, TOP_K = 24, 20, 5, 2


def some(tokens: list[int]):
    """Which of a sequence's tokens are no padding."""
    valid_T = torch.zeros(max(tokens, default=-1) + 1, dtype=torch.bool)
    valid_T[tokens] = True
    return tokens_of([len(valid_T)] if tokens else [], None, valid_T)


def make_layer(dtype=torch.float64, seed=0) -> MoE:
    layer = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K).to(dtype)
    init_weights(layer, seed, std=0.3)
    return layer


def naive(layer: MoE, x_TD: torch.Tensor, valid: list[int]) -> torch.Tensor:
    """Qwen3's sparse block, one token at a time."""
    out = []
    for t, x in enumerate(x_TD):
        total = torch.zeros_like(x)
        if t in valid:
            probabilities = (layer.router.weight @ x).softmax(-1)
            weights, chosen = probabilities.topk(TOP_K)
            for w, e in zip(weights / weights.sum(), chosen.tolist(), strict=True):
                gate, up = (x @ layer.experts.gate_up[e]).chunk(2)
                total = total + w * ((F.silu(gate) * up) @ layer.experts.down[e])
        out.append(total)
    return torch.stack(out) if out else x_TD


def grads(layer: MoE, x: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(
        (out * torch.sin(torch.arange(out.numel()).view_as(out))).sum(), inputs, allow_unused=True
    )
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


def force(monkeypatch, layout: str) -> None:
    limit = {"uniform": float("inf"), "ragged": -1000.0}[layout]
    monkeypatch.setattr("titan_vlm.models.moe.layout.spare_rows", lambda dtype: limit)


@pytest.mark.parametrize("layout", ["uniform", "ragged"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 150])
def test_output_and_gradients_equal_the_naive_loop(layout, tokens, monkeypatch):
    force(monkeypatch, layout)
    layer = make_layer()
    torch.manual_seed(tokens)
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    valid = [t for t in range(tokens) if t % 5 != 3]
    out = layer(x, some(valid))
    expected = naive(layer, x, valid)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(grads(layer, x, out), grads(layer, x, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", ["uniform", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_follow_float64(layout, dtype, monkeypatch):
    force(monkeypatch, layout)
    # Widths that are multiples of 8: the grouped kernel wants rows of whole 16 bytes.
    exact = MoE(32, 16, EXPERTS, TOP_K).double()
    init_weights(exact, 1, std=0.2)
    low = MoE(32, 16, EXPERTS, TOP_K).to(dtype)
    exact.load_state_dict(low.load_state_dict(exact.state_dict()) and low.state_dict())
    x = torch.randn(70, 32).to(dtype)
    index = some(list(range(70)))
    out, expected = low(x, index), exact(x.double(), index)
    out.double().sum().backward()
    expected.sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert (out.double() - expected).abs().max() < tolerance
    for a, b in zip(low.parameters(), exact.parameters(), strict=True):
        assert (a.grad.double() - b.grad).abs().max() < tolerance * max(1.0, b.grad.abs().max())


@pytest.mark.parametrize("layout", ["uniform", "ragged"])
def test_all_tokens_to_one_expert(layout, monkeypatch):
    force(monkeypatch, layout)
    layer = make_layer()
    x = torch.randn(40, WIDTH, dtype=torch.float64)
    routing = Routing(torch.arange(40), torch.full((40,), 3), torch.ones(40).double(), EXPERTS)
    rows, state = layer.dispatcher.dispatch(x, routing)
    out = layer.dispatcher.combine(layer.experts(rows, state.layout), state)
    gate, up = (x @ layer.experts.gate_up[3]).chunk(2, -1)
    torch.testing.assert_close(out, (F.silu(gate) * up) @ layer.experts.down[3])


def test_padding_tokens_never_reach_an_expert():
    layer = make_layer()
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    x[4:] = float("nan")  # would poison every sum it entered
    x.requires_grad_()
    out = layer(x, some([0, 1, 2, 3]))
    out.sum().backward()
    assert torch.equal(out[4:], torch.zeros(5, WIDTH, dtype=torch.float64))
    assert out.isfinite().all()
    assert layer.router.load_E.sum() == 4 * TOP_K
    assert all(p.grad.isfinite().all() for p in layer.experts.parameters())


def test_filler_rows_have_no_gradient():
    layer = make_layer()
    routing = Routing(torch.tensor([1]), torch.tensor([2]), torch.ones(1).double(), EXPERTS)
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    rows, state = layer.dispatcher.dispatch(x, routing)
    assert rows.shape[0] == ALIGN_WIDE
    layer.dispatcher.combine(layer.experts(rows, state.layout), state).sum().backward()
    assert torch.equal(x.grad[0], torch.zeros_like(x.grad[0]))  # the token that fillers copy
    assert x.grad[1].abs().max() > 0


def test_groups_are_aligned_and_pairs_lie_in_their_experts_group(monkeypatch):
    experts = torch.tensor([4, 0, 0, 2, 4, 4, 1])
    routing = Routing(torch.arange(7), experts, torch.arange(1.0, 8.0), EXPERTS)
    for kind in ("uniform", "ragged"):
        force(monkeypatch, kind)
        layout = make_layout(routing, torch.bfloat16)
        assert (layout.group is not None) == (kind == "uniform")
        ends = layout.ends_E.tolist()
        assert all(end % ALIGN == 0 for end in ends)
        group_of_row = torch.bucketize(layout.rows_P, layout.ends_E, right=True)
        assert torch.equal(group_of_row, experts)
        assert torch.equal(layout.source_R[layout.rows_P], routing.token_ids_P)
        assert layout.weights_R.sum() == routing.weights_P.sum()


def test_pairs_are_counted_once_under_activation_checkpointing():
    layer = make_layer()
    x = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True)
    checkpoint(layer, x, some(list(range(12))), use_reentrant=False).sum().backward()
    assert layer.router.load_E.sum() == 12 * TOP_K


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("layout", ["uniform", "ragged"])
def test_experts_with_biases_equal_a_loop_over_pairs(monkeypatch, layout, activation):
    force(monkeypatch, layout)
    experts = Experts(EXPERTS, WIDTH, HIDDEN, bias=True, activation=activation).double()
    for i, parameter in enumerate(experts.parameters()):
        torch.nn.init.normal_(parameter, 0.0, 0.3, torch.Generator().manual_seed(i))
    token_P = torch.arange(40).repeat_interleave(TOP_K)
    experts_P = torch.arange(80) ** 2 % EXPERTS  # 0, 1 and 4: two have no pair
    weights_P = torch.linspace(0.1, 2.0, 80).double().requires_grad_()
    x = torch.randn(40, WIDTH, dtype=torch.float64, requires_grad=True)
    rows, state = LocalDispatcher().dispatch(x, Routing(token_P, experts_P, weights_P, EXPERTS))
    ours = LocalDispatcher().combine(experts(rows, state.layout), state)
    plain = [torch.zeros(WIDTH, dtype=torch.float64) for _ in range(40)]
    for t, e, w in zip(token_P.tolist(), experts_P.tolist(), weights_P, strict=True):
        if activation == "gelu":
            hidden = F.gelu(x[t] @ experts.up[e] + experts.up_bias[e, 0], approximate="tanh")
        else:
            gate, up = (x[t] @ experts.gate_up[e] + experts.gate_up_bias[e, 0]).chunk(2)
            hidden = F.silu(gate) * up
        out = hidden @ experts.down[e] + experts.down_bias[e, 0]
        plain[t] = plain[t] + w * out
    plain = torch.stack(plain)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    inputs = [x, weights_P, *experts.parameters()]
    given = torch.autograd.grad(ours.sin().sum(), inputs)
    for g, wanted in zip(given, torch.autograd.grad(plain.sin().sum(), inputs), strict=True):
        torch.testing.assert_close(g, wanted, rtol=1e-11, atol=1e-12)


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
def test_a_bias_gradient_is_a_float32_sum_of_its_own_rows(device):
    ends = torch.tensor([5000, 5000, 13000], dtype=torch.int32, device=device)
    bias = torch.zeros(3, 1, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
    grad = torch.randn(13064, 8, generator=torch.Generator().manual_seed(0)) + 1
    grad = grad.to(device, torch.bfloat16)
    grad[13000:] = float("nan")  # nobody's rows: their memory is not cleared
    (given,) = torch.autograd.grad(_EachRow.apply(bias, ends, len(grad)), bias, grad)
    exact = grad.double()
    wanted = torch.stack([exact[:5000].sum(0), 0 * exact[0], exact[5000:13000].sum(0)])
    half_a_step = 2.0**-8  # of bfloat16; and what float32 adds to it
    torch.testing.assert_close(given.double().squeeze(1), wanted, rtol=1.01 * half_a_step, atol=0)
    for _ in range(3):
        (again,) = torch.autograd.grad(_EachRow.apply(bias, ends, len(grad)), bias, grad)
        assert torch.equal(again, given)


@pytest.mark.parametrize("num_rows", [0, ALIGN])
def test_a_bias_without_rows_has_a_gradient_of_zero(num_rows):
    bias = torch.randn(2, 1, 8, requires_grad=True)
    rows = _EachRow.apply(bias, torch.zeros(2, dtype=torch.int32), num_rows)
    (given,) = torch.autograd.grad(rows, bias, torch.ones(num_rows, 8))
    assert torch.equal(given, torch.zeros_like(bias))


def test_swiglu_gradient_is_exact():
    gate_up = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(6, 5, dtype=torch.float64)
    gate, up = gate_up.chunk(2, -1)
    plain = F.silu(gate) * up * weights.unsqueeze(-1)
    wanted = torch.autograd.grad(plain, (gate_up, weights), grad)
    ours = WeightedSwiGLU.apply(gate_up * 1.0, weights)  # a copy: its gradient overwrites it
    torch.testing.assert_close(ours, plain, rtol=1e-14, atol=1e-14)
    given = torch.autograd.grad(ours, (gate_up, weights), grad, retain_graph=True)
    torch.testing.assert_close(given, wanted, rtol=1e-14, atol=1e-14)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(ours, (gate_up, weights), grad)


def test_a_weight_in_bfloat16_is_one_rounding_of_four():
    """A product is off by what four numbers lose that are each rounded to 8 bits, no more; in
    float32 nothing is rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(4096, 64, generator=generator).bfloat16()
    weights = torch.rand(4096, generator=generator)
    gate, up = gate_up.double().chunk(2, -1)
    wanted = F.silu(gate) * up * weights.double().unsqueeze(-1)
    for dtype, rounding in ((torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-20)):
        ours = WeightedSwiGLU.apply(gate_up.to(dtype), weights).double()
        worst = ((ours - wanted) / wanted).abs().max()
        assert worst <= (1 + rounding) ** 4 - 1
    assert not torch.equal(weights.bfloat16().float(), weights)


def test_an_experts_weights_depend_on_seed_name_and_expert_alone():
    small, large = MoE(WIDTH, HIDDEN, 3, TOP_K), MoE(WIDTH, HIDDEN, EXPERTS, TOP_K)
    init_weights(small, 7, std=0.1)
    init_weights(large, 7, std=0.1)
    assert torch.equal(small.experts.down, large.experts.down[:3])
    assert not torch.equal(large.experts.down[0], large.experts.down[1])
    init_weights(small, 8, std=0.1)
    assert not torch.equal(small.experts.down, large.experts.down[:3])


def test_fsdp_finds_the_tensors_of_a_routing():
    """By pytrees in older PyTorch; without them a router of its own unit has freed weights in the
    backward pass."""
    importlib.import_module("titan_vlm.parallel.fsdp")
    routing = Routing(torch.arange(2), torch.arange(2), torch.ones(2, requires_grad=True), 2)
    assert any(x is routing.weights_P for x in tree_leaves(routing))
