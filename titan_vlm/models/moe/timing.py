"""How long a layer and its exchanges take in one step, forward and backward.

    forward     enter |------------------- the layer -------------------| leave
                                 enter |- exchange -| leave
    backward    enter |-------------------------------------------------| leave
                end                                                      begin

There is a mark before and one behind what is timed: functions of autograd that change nothing, so
that each is passed again in the backward pass, the other way round. On CUDA a mark records an
event and nobody waits for it before the step is reported; elsewhere it reads the clock of the host.

Left out: what activation checkpointing computes again; the backward pass where nothing in front of
the layer has a gradient; the weights' gradients where a zero-bubble schedule computes them apart.
What overlaps an exchange is not the exchange's: its time is that in which nothing else is computed.

A dispatcher serves all layers. Whose exchange it is follows, like a profiler's range, from which
layer runs: `Clock.running`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from titan_vlm.models.moe.layout import Layout

Stamp = float | torch.cuda.Event
# What a layer counts on each rank, beside its two times; `Clock.read` has them in this order.
COUNTS = ("moe_calls", "a2a_calls", "a2a_bytes", "pairs", "rows")


# More than a step has, and so old that a device has long passed them.
MOST_SPANS = 1024


@dataclass
class Laps:
    """Times of one kind: calls that began, bytes they sent, begin and end of each way.

    Where nobody resets a clock, the older half of `MOST_SPANS` becomes a sum, `older_ms`.
    """

    spans: list[tuple[Stamp, Stamp]] = field(default_factory=list)
    older_ms: float = 0.0
    calls: int = 0
    bytes: int = 0

    def add(self, begin: Stamp, end: Stamp) -> None:
        """A span that ends last."""
        self.spans.append((begin, end))
        if len(self.spans) >= MOST_SPANS:
            older, self.spans = self.spans[: MOST_SPANS // 2], self.spans[MOST_SPANS // 2 :]
            self.older_ms += _sum_ms(older)

    def ms(self) -> float:
        """Of all spans together. Waits for the device to have come to their ends."""
        return self.older_ms + _sum_ms(self.spans)


class Clock:
    """Of one layer of this rank, since it was last reset.

    layer, exchange     their times
    pairs, rows         that its experts had: `rows` with the fillers between the groups
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.layer, self.exchange = Laps(), Laps()
        self.pairs = self.rows = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """The layer's forward pass: exchanges inside are its own."""
        global _running
        _running, outer = self, _running
        try:
            yield
        finally:
            _running = outer

    def read(self) -> tuple[list[float], list[float]]:
        """Milliseconds of the layer and of its exchanges, and `COUNTS`."""
        layer, exchange = self.layer, self.exchange
        counts = [layer.calls, exchange.calls, exchange.bytes, self.pairs, self.rows]
        return [layer.ms(), exchange.ms()], counts


_running: Clock | None = None


def timed_exchange(
    run: Callable[[Tensor], Any], x: Tensor, sent: tuple[int | None, int | None]
) -> Any:
    """`run(x)`, an exchange of the layer that runs, if anybody asks.

    Args:
        run: returns a tensor, or a tuple that begins with the one whose gradient goes back.
        sent: bytes that leave this rank, forward and backward; None: that way is part of a call
            which is counted elsewhere.
    """
    if _running is None:
        return run(x)
    return _timed(run, x, _Span(_running.exchange, sent))


def count_rows(layout: Layout) -> None:
    """The rows of the layer that runs, if anybody asks. The host knows both numbers."""
    if _running is not None:
        _running.pairs += layout.rows_P.numel()
        _running.rows += layout.weights_R.numel()


def timed_layer(run: Callable[[Tensor], Tensor], x: Tensor, clock: Clock) -> Tensor:
    """`run(x)`, a layer."""
    with clock.running():
        return _timed(run, x, _Span(clock.layer, (0, None), is_layer=True))


@contextmanager
def left_out() -> Iterator[None]:
    """Activation checkpointing computes a block again, often amid the backward pass of the block's
    own layer, which is the first to ask for what was not kept. The layer's time stands still."""
    global _going_back
    span, _going_back = _going_back, None
    if span is not None:
        span.end()
    try:
        yield  # the recomputation may end by an exception, as soon as there is all that is needed
    finally:
        if span is not None:
            span.begin()
        _going_back = span


_going_back: "_Span | None" = None  # a layer in its backward pass


def _timed(run: Callable[[Tensor], Any], x: Tensor, span: "_Span") -> Any:
    out = run(_Enter.apply(x, span))
    if isinstance(out, tuple):
        return _Leave.apply(out[0], span), *out[1:]
    return _Leave.apply(out, span)


class _Span:
    def __init__(self, laps: Laps, sent: tuple[int | None, int | None], is_layer: bool = False):
        self.laps, self.sent, self.is_layer = laps, sent, is_layer

    def begin(self) -> None:
        self.began = _now(self.device)

    def end(self) -> None:
        self.laps.add(self.began, _now(self.device))

    def count(self, sent: int | None) -> None:
        if sent is not None:
            self.laps.calls += 1
            self.laps.bytes += sent


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, span: _Span) -> Tensor:
        ctx.span = span
        span.device, span.comes_back = x.device, ctx.needs_input_grad[0]
        span.begin()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        global _going_back
        ctx.span.end()
        ctx.span.count(ctx.span.sent[1])
        if _going_back is ctx.span:
            _going_back = None
        return grad, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, span: _Span) -> Tensor:
        ctx.span = span
        span.end()
        span.count(span.sent[0])
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        global _going_back
        if ctx.span.comes_back:
            ctx.span.begin()
            if ctx.span.is_layer:
                _going_back = ctx.span
        return grad, None


def _now(device: torch.device) -> Stamp:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _sum_ms(spans: list[tuple[Stamp, Stamp]]) -> float:
    return sum(_ms_between(begin, end) for begin, end in spans)


def _ms_between(begin: Stamp, end: Stamp) -> float:
    if isinstance(begin, float):
        return (end - begin) * 1e3
    end.synchronize()
    return begin.elapsed_time(end)
