"""Bringing tokens to experts on other ranks and back, beside its limits, in one process group.

Forward and backward of dispatch + combine (no experts in between), on EP 2 and 4 over gloo:

    all_to_all   ours                                          the others are measured beside it:
    bare         all_to_all_single of the same bytes, four times: out and back, and their gradients
    allgather    every rank gets every token, as transformers' expert parallelism has it
    copy         the local part alone: rows spread to aligned groups and summed again

On one GPU there is nobody to talk to: the local part against plain copies of the same bytes.
Figures are medians over the steps of the slowest rank; the last line is one JSON object, its ratios
are of times.
"""

import argparse
import json
import os
import platform
import time
from statistics import median

import torch
import torch.distributed as dist
from gloo_world import World

from titan_vlm import distributed
from titan_vlm.models.moe.dispatcher import LocalDispatcher
from titan_vlm.models.moe.exchange import AllGatherDispatcher, AllToAllDispatcher
from titan_vlm.models.moe.routing import Routing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each rank")
    parser.add_argument("--width", type=int, default=1024, help="D")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--quick", action="store_true", help="few steps")
    arguments = parser.parse_args()
    size = (arguments.tokens, arguments.width, arguments.experts, arguments.top_k)
    steps = 4 if arguments.quick else arguments.steps
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}; {size[0]} tokens x {size[1]} a rank, top-{size[3]} of {size[2]}"
    )
    figures: dict[str, float] = {}
    if torch.cuda.is_available():
        figures |= measure_on_a_device(size, steps)
    else:
        world = World()
        try:
            for ranks in (2, 4):
                figures |= report(ranks, world.run(ranks, measure, size, steps))
        finally:
            world.close()
    print(json.dumps(figures))


def report(ranks: int, times: list[dict[str, list[float]]]) -> dict[str, float]:
    """A step takes as long as its slowest rank."""
    taken = {
        name: median(max(step) for step in zip(*(t[name] for t in times), strict=True))
        for name in times[0]
    }
    print(f"EP {ranks}: " + ", ".join(f"{name} {t * 1e3:.1f} ms" for name, t in taken.items()))
    ratios = {
        f"ratio_over_{name}_ep{ranks}": taken["all_to_all"] / taken[name]
        for name in ("bare", "allgather")
    }
    print("  " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    return ratios | {f"{name}_ms_ep{ranks}": t * 1e3 for name, t in taken.items()}


def measure(size: tuple[int, int, int, int], steps: int) -> dict[str, list[float]]:
    """Seconds of each way and step on this rank; every step begins on all ranks together."""
    distributed.start("cpu")
    group, x_TD, routing = dist.group.WORLD, *make_work(size, "cpu")
    # What the exchange sends, as the bare limit.
    counts = routing.counts_E.view(dist.get_world_size(), -1).sum(1)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts)
    sent, arrived = counts.tolist(), arriving.tolist()
    rows_out = x_TD.detach().new_empty(sum(sent), x_TD.shape[1])
    rows_in = x_TD.detach().new_empty(sum(arrived), x_TD.shape[1])

    def bare() -> None:
        for _ in range(2):
            dist.all_to_all_single(rows_in, rows_out, arrived, sent)
            dist.all_to_all_single(rows_out, rows_in, sent, arrived)

    ways = {
        "all_to_all": there_and_back(AllToAllDispatcher(group), x_TD, routing),
        "bare": bare,
        "allgather": there_and_back(AllGatherDispatcher(group), x_TD, routing),
        "copy": there_and_back(LocalDispatcher(), x_TD, routing),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(steps + 2):
        for name, run in ways.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            if i >= 2:
                taken[name].append(time.perf_counter() - start)
    return taken


def make_work(size: tuple[int, int, int, int], device: str) -> tuple[torch.Tensor, Routing]:
    tokens, width, experts, top_k = size
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(tokens, width, generator=generator).to(device, torch.bfloat16)
    experts_TK = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    weights_P = torch.rand(tokens * top_k, generator=generator).to(device)
    token_ids_P = torch.arange(tokens).repeat_interleave(top_k).to(device)
    routing = Routing(
        token_ids_P, experts_TK.flatten().to(device), weights_P.requires_grad_(), experts
    )
    return x_TD.requires_grad_(), routing


def there_and_back(dispatcher, x_TD: torch.Tensor, routing: Routing):
    """Dispatch and combine, forward and backward, with nothing in between."""

    def run() -> None:
        rows_RD, state = dispatcher.dispatch(x_TD, routing)
        y_TD = dispatcher.combine(rows_RD, state)
        y_TD.backward(torch.ones_like(y_TD))
        x_TD.grad = None

    return run


def measure_on_a_device(size: tuple[int, int, int, int], steps: int) -> dict[str, float]:
    """The local part against reading and writing as many bytes: R rows out, R in, twice."""
    x_TD, routing = make_work(size, "cuda")
    dispatcher = LocalDispatcher()
    rows_RD, _ = dispatcher.dispatch(x_TD, routing)
    source, target = rows_RD.detach().clone(), torch.empty_like(rows_RD)

    def copies() -> None:
        for _ in range(4):
            target.copy_(source)

    ways = {"copy": there_and_back(dispatcher, x_TD, routing), "bare": copies}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(steps + 3):
        for name, run in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if i >= 3:
                taken[name].append(time.perf_counter() - start)
    seconds = {name: median(times) for name, times in taken.items()}
    print(
        f"{torch.cuda.get_device_name()}: "
        + ", ".join(f"{n} {t:.2e} s" for n, t in seconds.items())
    )
    return {"ratio_copy_over_bare": seconds["copy"] / seconds["bare"]}


if __name__ == "__main__":
    main()
