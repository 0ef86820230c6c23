"""One MoE layer, forward and backward: ours beside its peers, the same weights and tokens.

    ours         `titan_vlm.models.moe.layer.MoE`
    eager        transformers' sparse block of Qwen3-VL-MoE, a loop over the experts
    grouped_mm   the same block, its experts as grouped matmuls
    torchtitan   TorchTitan's MoE layer, where it is installed. Its experts compute in bfloat16
                 whatever the weights are, so it has no float32 rows. It may live in an environment
                 of its own (`--peer-python`); it always runs in a process of its own.
    dense        a SwiGLU of width K * F: as many FLOPs, no routing. The limit of all of them.

Before anything is timed every peer's output and input gradient must equal ours. The sides take
turns, so that a noisy machine hits all alike, and figures are medians. Every step has tokens of its
own, as in training: the experts' loads change from step to step, and with them the shapes for
which a CPU's matmul library would otherwise have its kernels ready.

On CPU: T 512 to 16,384, D = F = 256, and 8, 32 and 128 experts with the top-k of published models
of that size (Mixtral 2, gpt-oss 4, Qwen3 8). With `--device cuda`: Qwen3-VL-30B-A3B's layer and the
shapes of SonicMoE (arXiv 2512.14080), in bfloat16, with TFLOP/s beside those of a dense matmul.

A ratio is the side's time over ours: above 1, ours is faster. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch
import transformers
from moe_work import (
    Seconds,
    Shape,
    Side,
    Weights,
    make_tokens,
    make_weights,
    mark,
    output_and_gradient,
    time_step,
)
from torch import Tensor

from titan_vlm.distributed import tune_cpu
from titan_vlm.models.layers.mlp import SwiGLU
from titan_vlm.models.moe.layer import MoE

TOP_K = {8: 2, 32: 4, 128: 8}
WARM_UP = 3
EXACT, LOW = 1e-4, 3e-2  # largest error over largest value: experts in float32, in bfloat16
SIDES = ("ours", "eager", "grouped_mm", "torchtitan", "dense")
CUDA_SHAPES = [
    Shape(16384, 2048, 768, 128, 8),
    Shape(32768, 2048, 768, 128, 8),
    Shape(24576, 1536, 256, 128, 8),
    Shape(32768, 4096, 512, 128, 8),
    Shape(32768, 4096, 1024, 64, 4),
]


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    device, steps = arguments.device, 2 if arguments.quick else arguments.steps
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    tune_cpu()
    print(machine(device))
    peer = start_titan(arguments.peer_python)
    try:
        shapes, dtypes = work(arguments)
        for shape in {replace(s, tokens=min(512, s.tokens)): None for s in shapes}:
            check_equal(shape, device, peer)
        table = []
        print(heading(device))
        for dtype in dtypes:
            for shape in shapes:
                table.append(measure(shape, dtype, device, steps, peer))
                print(as_line(table[-1], device), flush=True)
    finally:
        if peer:
            peer.close()
    print(json.dumps({"machine": machine(device), "rows": table}))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128], choices=TOP_K)
    parser.add_argument("--width", type=int, default=256, help="D")
    parser.add_argument("--hidden", type=int, default=256, help="F")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each side")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="the Python that has torchtitan"
    )
    parser.add_argument("--quick", action="store_true", help="one small size, few steps, float32")
    return parser.parse_args(argv)


def work(arguments: argparse.Namespace) -> tuple[list[Shape], list[torch.dtype]]:
    if arguments.quick:
        return [Shape(256, 64, 64, 8, 2, skewed) for skewed in (False, True)], [torch.float32]
    if arguments.device == "cuda":
        return CUDA_SHAPES, [torch.bfloat16]
    shapes = [
        Shape(tokens, arguments.width, arguments.hidden, experts, TOP_K[experts], skewed)
        for experts in arguments.experts
        for skewed in (False, True)
        for tokens in arguments.tokens
    ]
    return shapes, [getattr(torch, name) for name in arguments.dtype]


def machine(device: str) -> str:
    """One line that names hardware and versions."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------- the sides


def our_side(shape: Shape, weights: Weights, dtype: torch.dtype, device: str) -> Side:
    """The only place that knows how our layer is built and called."""
    with torch.device(device):
        layer = MoE(shape.width, shape.hidden, shape.experts, shape.top_k).to(dtype)
        index_T = torch.arange(shape.tokens)
    with torch.no_grad():
        layer.router.weight.copy_(weights.router_ED)
        layer.experts.gate_up.copy_(torch.cat((weights.gate_EFD, weights.up_EFD), 1).mT)
        layer.experts.down.copy_(weights.down_EDF.mT)
    return Side(lambda x_TD: layer(x_TD, index_T), list(layer.parameters()))


def transformers_side(
    kind: str,
    shape: Shape,
    weights: Weights,
    dtype: torch.dtype,
    device: str,
    experts_dtype: torch.dtype | None = None,
) -> Side:
    from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as modeling

    config = transformers.models.qwen3_vl_moe.Qwen3VLMoeTextConfig(
        hidden_size=shape.width,
        moe_intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation=kind,
    )
    with torch.device(device):
        block = modeling.Qwen3VLMoeTextSparseMoeBlock(config).to(dtype)
    block.experts.to(experts_dtype or dtype)
    with torch.no_grad():
        block.gate.weight.copy_(weights.router_ED)
        block.experts.gate_up_proj.copy_(torch.cat((weights.gate_EFD, weights.up_EFD), 1))
        block.experts.down_proj.copy_(weights.down_EDF)
    return Side(lambda x_TD: block(x_TD.unsqueeze(0)).squeeze(0), list(block.parameters()))


def dense_side(shape: Shape, dtype: torch.dtype, device: str) -> Side:
    with torch.device(device):
        mlp = SwiGLU(shape.width, shape.top_k * shape.hidden).to(dtype)
    return Side(mlp, list(mlp.parameters()))


class TitanPeer:
    """TorchTitan's layer in its own process; the protocol is in `titan_peer.py`."""

    def __init__(self, python: str):
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("titan_peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **request) -> dict:
        """Raises RuntimeError with what went wrong there."""
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline() or '{"error": "it ended"}')
        except BrokenPipeError:
            answer = {"error": "it ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def build(self, shape: Shape, dtype: torch.dtype, device: str, steps: int) -> None:
        self.ask(
            build=asdict(shape),
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            steps=steps,
            threads=torch.get_num_threads(),
        )

    def output_and_gradient(self) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/saved.pt"
            self.ask(save=path)
            return torch.load(path)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def start_titan(python: str) -> TitanPeer | None:
    """None, and a line that says why, where it cannot be imported."""
    try:
        peer = TitanPeer(python)
    except OSError as error:
        print(f"torchtitan is left out: {error}")
        return None
    try:
        peer.build(Shape(8, 16, 16, 4, 2), torch.float32, "cpu", 1)
        return peer
    except RuntimeError as error:
        peer.close()
        print(
            f"torchtitan is left out ({error}): install it, best in an environment of its own, "
            f"and name that one's Python with --peer-python"
        )
        return None


# ---------------------------------------------------------------------------- measuring


def check_equal(shape: Shape, device: str, peer: TitanPeer | None) -> None:
    """Every peer's output and input gradient are ours; routers in float32, experts where they can.

    Raises:
        RuntimeError: they are not: the sides would not do the same work.
    """
    weights, dtype = make_weights(shape, device), torch.float32
    x_TD = make_tokens(shape, 0, dtype, device)
    ours = output_and_gradient(our_side(shape, weights, dtype, device), x_TD).cpu()
    theirs, limits = {}, {name: EXACT for name in SIDES}
    for kind in ("eager", "grouped_mm"):
        low = torch.bfloat16 if kind == "grouped_mm" and device == "cuda" else None  # its kernel
        limits[kind] = LOW if low else EXACT
        side = transformers_side(kind, shape, weights, dtype, device, experts_dtype=low)
        theirs[kind] = output_and_gradient(side, x_TD).cpu()
    if peer:
        limits["torchtitan"] = LOW
        peer.build(shape, dtype, device, 1)
        theirs["torchtitan"] = peer.output_and_gradient()
    for name, values in theirs.items():
        for what, a, b in zip(("output", "input gradient"), values, ours, strict=True):
            error = ((a - b).abs().max() / b.abs().max()).item()
            if not error < limits[name]:
                raise RuntimeError(f"{shape}: the {what} of {name} is off ours by {error:.1e}")


def measure(
    shape: Shape, dtype: torch.dtype, device: str, steps: int, peer: TitanPeer | None
) -> dict:
    """One row: median seconds of each side."""
    weights, total = make_weights(shape, device), steps + WARM_UP
    tokens = [make_tokens(shape, i, dtype, device) for i in range(total)]
    sides = {
        "ours": our_side(shape, weights, dtype, device),
        "eager": transformers_side("eager", shape, weights, dtype, device),
        "grouped_mm": transformers_side("grouped_mm", shape, weights, dtype, device),
        "dense": dense_side(shape, dtype, device),
    }
    logits_TE = tokens[0].float() @ weights.router_ED.t()
    load_E = logits_TE.topk(shape.top_k).indices.flatten().bincount(minlength=shape.experts)
    del weights

    steppers: dict[str, Callable[[int], Seconds]] = {
        name: lambda i, side=side: time_step(side, tokens[i]) for name, side in sides.items()
    }
    if peer and dtype == torch.bfloat16:
        peer.build(shape, dtype, device, total)
        steppers["torchtitan"] = lambda i: Seconds(**peer.ask(step=i))
    seconds = interleaved(steppers, total)
    return {
        **asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "busiest_over_mean": (load_E.max() / load_E.double().mean()).item(),
        "ms": {name: taken.both * 1e3 for name, taken in seconds.items()},
        "ratio": {name: taken.both / seconds["ours"].both for name, taken in seconds.items()},
        "tflops": {name: rates(shape, taken) for name, taken in seconds.items()},
    }


def interleaved(steppers: dict[str, Callable[[int], Seconds]], total: int) -> dict[str, Seconds]:
    """The median step of each after `WARM_UP`; everyone's step i comes before anyone's i + 1."""
    taken: dict[str, list[Seconds]] = {name: [] for name in steppers}
    for i in range(total):
        for name, step in steppers.items():
            taken[name].append(step(i))
    return {
        name: sorted(steps[WARM_UP:], key=lambda seconds: seconds.both)[(total - WARM_UP) // 2]
        for name, steps in taken.items()
    }


# ---------------------------------------------------------------------------- the table


def heading(device: str) -> str:
    names = "| T | D | F | E | K | dtype | routing | busiest / mean | " + " | ".join(SIDES) + " |"
    cells = "ms (ratio to ours)"
    if device == "cuda":
        cells += f", TFLOP/s forward / backward; a dense matmul: {matmul_rate():.0f}"
    return f"{cells}\n{names}\n" + "|---" * (names.count("|") - 1) + "|"


def as_line(row: dict, device: str) -> str:
    cells = [str(row[k]) for k in ("tokens", "width", "hidden", "experts", "top_k", "dtype")]
    cells += ["skewed" if row["skewed"] else "balanced", f"{row['busiest_over_mean']:.1f}"]
    for name in SIDES:
        if name not in row["ms"]:
            cells.append("-")
            continue
        cell = f"{row['ms'][name]:.1f}"
        if name != "ours":
            cell += f" ({row['ratio'][name]:.2f})"
        if device == "cuda":
            cell += " {:.0f} / {:.0f}".format(*row["tflops"][name])
        cells.append(cell)
    return "| " + " | ".join(cells) + " |"


def rates(shape: Shape, seconds: Seconds) -> tuple[float, float]:
    """TFLOP/s of forward and of backward, of which the matmuls are twice as many."""
    work = shape.forward_flops / 1e12
    return work / seconds.forward, 2 * work / seconds.backward


def matmul_rate(size: int = 8192, steps: int = 20) -> float:
    """TFLOP/s of one large bfloat16 matmul on this card."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    times = []
    for _ in range(steps):
        start = mark(a.device)
        a @ a
        end = mark(a.device)
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * size**3 / median(times) / 1e12


if __name__ == "__main__":
    main()
