"""Times, calls, bytes and rows of MoE layers, by a clock that only what is computed moves."""

from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from titan_vlm.models.init import init_weights
from titan_vlm.models.moe import timing
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.layout import ALIGN_WIDE
from titan_vlm.models.moe.timing import COUNTS
from titan_vlm.models.moe.tokens import Moment, tokens_of
from titan_vlm.parallel.activation_checkpoint import _checkpointed

WIDTH, HIDDEN, EXPERTS, TOP_K = 24, 20, 5, 2


@pytest.fixture
def seconds(monkeypatch):
    """The time; whoever wants it to pass adds to it."""
    time = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: time[0])
    return time


class Takes(torch.autograd.Function):
    """Nothing but time, both ways; it keeps a tensor, as most of what is computed does."""

    @staticmethod
    def forward(ctx, x, clock, forward, backward):
        clock[0] += forward
        ctx.save_for_backward(x * 1.0)
        ctx.clock, ctx.time = clock, backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        _ = ctx.saved_tensors
        ctx.clock[0] += ctx.time
        return grad, None, None, None


def make_layer(seconds) -> MoE:
    """Its experts take 2 s forward and 3 s backward."""
    layer = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K).double()
    init_weights(layer, 0, std=0.3)
    experts = layer.experts.forward
    layer.experts.forward = lambda x, layout: experts(Takes.apply(x, seconds, 2.0, 3.0), layout)
    return layer


def block(layer, seconds, tokens, x):
    """Before and behind the layer other things take time: 10 and 20 s, 100 and 200 s."""
    x = layer(Takes.apply(x, seconds, 10.0, 20.0), tokens)
    return Takes.apply(x, seconds, 100.0, 200.0)


def some_tokens(count: int, **moment):
    return tokens_of([count], None, None, Moment(**moment))


def taken(layer) -> dict[str, float]:
    (moe_ms, a2a_ms), counts = layer.clock.read()
    layer.clock.reset()
    return {"moe_ms": moe_ms, "a2a_ms": a2a_ms} | dict(zip(COUNTS, counts, strict=True))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_a_layer_is_timed_both_ways_and_not_what_is_computed_again(seconds, again):
    layer = make_layer(seconds)
    x = torch.randn(30, WIDTH, dtype=torch.float64, requires_grad=True)
    run = partial(block, layer, seconds, some_tokens(30))
    for _ in range(2):
        (_checkpointed(run, {}) if again else run)(x).sum().backward()
    found = taken(layer)
    assert found["moe_ms"] == 2 * (2 + 3) * 1e3
    assert found["moe_calls"] == 2
    assert found["pairs"] == 2 * 30 * TOP_K
    assert found["a2a_ms"] == found["a2a_calls"] == found["a2a_bytes"] == 0
    assert set(taken(layer).values()) == {0}  # it began anew


def test_a_clock_that_nobody_reads_does_not_grow(seconds, monkeypatch):
    monkeypatch.setattr(timing, "MOST_SPANS", 8)
    layer = make_layer(seconds)
    x = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    for _ in range(20):
        layer(x, some_tokens(6)).sum().backward()
        assert len(layer.clock.layer.spans) < 8
    found = taken(layer)
    assert found["moe_ms"] == 20 * (2 + 3) * 1e3 and found["moe_calls"] == 20
    assert taken(layer)["moe_ms"] == 0


def test_the_time_of_a_block_whose_last_part_is_the_layer(seconds):
    """There the layer is the first to ask for what is computed again."""
    layer = make_layer(seconds)
    x = torch.randn(30, WIDTH, dtype=torch.float64, requires_grad=True)

    def run(x):
        return layer(Takes.apply(x, seconds, 10.0, 20.0), some_tokens(30))

    _checkpointed(run, {})(x).sum().backward()
    assert seconds[0] == 10 + 2 + 10 + 2 + 3 + 20  # it was computed again
    found = taken(layer)
    assert found["moe_ms"] == 5e3 and found["moe_calls"] == 1


def test_rows_are_counted_with_their_fillers(seconds):
    layer = make_layer(seconds)
    x = torch.randn(30, WIDTH, dtype=torch.float64)
    layer(x, some_tokens(30))
    counts = layer.router.load_E.tolist()
    found = taken(layer)
    assert found["rows"] == sum(-(-n // ALIGN_WIDE) * ALIGN_WIDE for n in counts)
    assert found["pairs"] == sum(counts) == 60


def test_nothing_is_timed_where_nobody_asks_or_nothing_is_trained(seconds):
    layer = make_layer(seconds)
    x = torch.randn(8, WIDTH, dtype=torch.float64, requires_grad=True)
    plain = layer(x, some_tokens(8, observe=False))
    layer.eval()
    assert torch.equal(layer(x, some_tokens(8)), plain)
    assert set(taken(layer).values()) == {0}
    nodes = {type(node).__name__ for node, _ in plain.grad_fn.next_functions}
    assert "_LeaveBackward" not in nodes | {type(plain.grad_fn).__name__}


def test_a_layer_below_which_nothing_learns_is_timed_forward(seconds):
    layer = make_layer(seconds)
    x = torch.randn(8, WIDTH, dtype=torch.float64)
    layer(x, some_tokens(8)).sum().backward()
    seconds[0] += 1000
    with timing.left_out():  # of another block, later
        pass
    assert taken(layer)["moe_ms"] == 2e3


def test_marks_change_no_number(seconds):
    layer = make_layer(seconds)

    def gradients(observe):
        x = torch.linspace(-1, 1, 8 * WIDTH, dtype=torch.float64).view(8, WIDTH).requires_grad_()
        out = layer(x, some_tokens(8, observe=observe))
        return [out, *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, theirs)


def test_a_profile_shows_the_parts_of_a_layer(seconds):
    layer = make_layer(seconds)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        layer(torch.randn(8, WIDTH, dtype=torch.float64), some_tokens(8))
    ranges = {event.key for event in trace.key_averages()}
    assert {"moe.route", "moe.dispatch", "moe.experts", "moe.combine"} <= ranges


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_times_are_the_devices():
    layer = MoE(1024, 512, 8, 2).cuda().bfloat16()
    init_weights(layer, 0, std=0.3)
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(3):  # the first make kernels and memory
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        layer.clock.reset()
        before.record()
        layer(x, some_tokens(4096).to("cuda")).sum().backward()
        after.record()
    after.synchronize()
    whole = before.elapsed_time(after)
    assert 0.5 * whole < taken(layer)["moe_ms"] <= whole
