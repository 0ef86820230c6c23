"""The parts of the MoE layer that are written for speed, each beside the plain way to write it.

The whole layer, forward and backward, as it is and with one part replaced, the ways in turn:

    swiglu     one function with a backward pass in place     three operations of autograd
    gather     tokens spread and summed by gathers both ways  index_select and index_add
    align      groups at multiples of rows                    groups as long as they are
    batched    one product where groups are nearly equal      always a loop over the experts

Figures are medians; a ratio above 1 is what the part is worth. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from unittest import mock

import moe_sides
import torch
import torch.nn.functional as F
from torch import Tensor

from titan_vlm.models.moe import dispatcher, experts, layout
from titan_vlm.models.moe.dispatcher import Rows

SHAPES = ((2048, 8, 2), (8192, 32, 4), (8192, 128, 8))  # T, E, K


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--width", type=int, default=256, help="D")
    parser.add_argument("--hidden", type=int, default=256, help="F")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each way")
    parser.add_argument("--quick", action="store_true", help="one small size, two steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    shapes = ((128, 4, 2),) if arguments.quick else SHAPES
    steps = 2 if arguments.quick else arguments.steps
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread"
    print(f"{machine}, torch {torch.__version__}; milliseconds, in brackets plain / ours\n")
    print(f"| T | E | K | dtype | ours | {' | '.join(PLAIN)} |\n|{'---|' * (5 + len(PLAIN))}")
    rows = []
    for dtype in arguments.dtype:
        for tokens, num_experts, top_k in shapes:
            shape = moe_sides.Shape(tokens, arguments.width, arguments.hidden, num_experts, top_k)
            times = measure(shape, getattr(torch, dtype), steps)
            rows.append({"T": tokens, "E": num_experts, "K": top_k, "dtype": dtype, "ms": times})
            ours = times["ours"]
            plain = " | ".join(f"{times[name]:.1f} ({times[name] / ours:.2f})" for name in PLAIN)
            print(f"| {tokens} | {num_experts} | {top_k} | {dtype} | {ours:.1f} | {plain} |")
    print(json.dumps({"machine": machine, "rows": rows}))


def measure(shape: moe_sides.Shape, dtype: torch.dtype, steps: int) -> dict[str, float]:
    """Milliseconds of the layer as it is ("ours") and with each part written plainly."""
    weights = moe_sides.make_weights(shape, "cpu")
    side = moe_sides.SIDES["ours"](shape, weights, dtype, dtype, "cpu")
    times: dict[str, list[float]] = {"ours": [], **{name: [] for name in PLAIN}}
    for step in range(-3, steps):  # the first three compile kernels
        x_TD = moe_sides.make_tokens(shape, 1000 + step, dtype, "cpu")
        for name, taken in times.items():
            with PLAIN.get(name, as_it_is)():
                seconds = moe_sides.time_step(side, x_TD)
            if step >= 0:
                taken.append(1e3 * (seconds.forward + seconds.backward))
    return {name: median(taken) for name, taken in times.items()}


# ---------------------------------------------------------------------------- the plain ways


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


@contextmanager
def plain_swiglu() -> Iterator[None]:
    def apply(gate_up_RF: Tensor, weights_R: Tensor) -> Tensor:
        gate, up = gate_up_RF.chunk(2, -1)
        return F.silu(gate) * up * weights_R.to(gate.dtype).unsqueeze(-1)

    with mock.patch.object(experts.WeightedSwiGLU, "apply", apply):
        yield


@contextmanager
def plain_gather() -> Iterator[None]:
    def spread(rows: Rows, x_TD: Tensor) -> Tensor:
        return x_TD.index_select(0, rows.source_R)

    def collect(rows: Rows, y_RD: Tensor) -> Tensor:
        token_of_P = rows.source_R[rows.rows_P]
        zeros_TD = y_RD.new_zeros(len(rows.bags_T), y_RD.shape[1])
        return zeros_TD.index_add(0, token_of_P, y_RD.index_select(0, rows.rows_P))

    with mock.patch.multiple(dispatcher.Rows, spread=spread, collect=collect):
        yield


@contextmanager
def unaligned() -> Iterator[None]:
    with mock.patch.object(dispatcher.LocalDispatcher, "align", 1):
        yield


@contextmanager
def always_a_loop() -> Iterator[None]:
    with mock.patch.object(layout, "spare_rows", lambda dtype: -(2**40)):
        yield


PLAIN: dict[str, Callable] = {
    "swiglu": plain_swiglu,
    "gather": plain_gather,
    "align": unaligned,
    "batched": always_a_loop,
}

if __name__ == "__main__":
    main()
