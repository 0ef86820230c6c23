"""One MoE layer, forward and backward: ours beside its peers, the same weights and tokens.

    ours         `titan_vlm.models.moe.layer.MoE`
    eager        transformers' sparse block of Qwen3-VL-MoE, a loop over the experts
    grouped_mm   the same block, its experts as grouped matmuls
    torchtitan   TorchTitan's MoE layer, where it is installed. Its experts compute in bfloat16
                 whatever the weights are, so it has no float32 rows. `--peer-python` names the
                 interpreter of the environment that has it.
    dense        a SwiGLU of width K * F: as many FLOPs, no routing. The limit of all of them.

Before anything is timed every peer's output and input gradient must equal ours. The sides, each in
a process of its own (`moe_sides.py`), take turns, so that a noisy machine hits all alike; figures
are medians. Every step has tokens of its own, as in training: the experts' loads change from step
to step, and with them the shapes for which a CPU's matmul library has its kernels ready.

On CPU: T 512 to 16,384, D = F = 256, and 8, 32 and 128 experts with the top-k of published models
of that size (Mixtral 2, gpt-oss 4, Qwen3 8). With `--device cuda`: Qwen3-VL-30B-A3B's layer and the
shapes of SonicMoE (arXiv 2512.14080), in bfloat16, with TFLOP/s beside those of a dense matmul.

A ratio is the side's time over ours: above 1, ours is faster. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from moe_sides import SIDES, Seconds, Shape, make_tokens, make_weights, mark
from torch import Tensor

TOP_K = {8: 2, 32: 4, 128: 8}
WARM_UP = 10  # steps, until the kernels of the usual shapes are compiled
EXACT, LOW = 1e-4, 3e-2  # largest error over largest value: experts in float32, in bfloat16
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
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as our trainer has it, for all sides
    print(machine(device))
    sides = start(arguments.peer_python)
    try:
        shapes, dtypes = work(arguments)
        for shape in {replace(s, tokens=min(512, s.tokens)): None for s in shapes}:
            check_equal(shape, device, sides)
        table = []
        print(heading(device))
        for dtype in dtypes:
            for shape in shapes:
                table.append(measure(shape, dtype, device, steps, sides))
                print(as_line(table[-1], device), flush=True)
    finally:
        for side in sides.values():
            side.close()
    print(json.dumps({"machine": machine(device), "rows": table}))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128], choices=TOP_K)
    parser.add_argument("--width", type=int, default=256, help="D")
    parser.add_argument("--hidden", type=int, default=256, help="F")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each side")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="the Python that has torchtitan"
    )
    parser.add_argument("--quick", action="store_true", help="one small size, few steps, float32")
    return parser.parse_args(argv)


def work(arguments: argparse.Namespace) -> tuple[list[Shape], list[str]]:
    if arguments.quick:
        return [Shape(256, 64, 64, 8, 2, skewed) for skewed in (False, True)], ["float32"]
    if arguments.device == "cuda":
        return CUDA_SHAPES, ["bfloat16"]
    shapes = [
        Shape(tokens, arguments.width, arguments.hidden, experts, TOP_K[experts], skewed)
        for experts in arguments.experts
        for skewed in (False, True)
        for tokens in arguments.tokens
    ]
    return shapes, arguments.dtype


def machine(device: str) -> str:
    """One line that names hardware and versions."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, transformers {version('transformers')}"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------- the processes


class Process:
    """One side in a process of its own; `moe_sides.py` has the protocol."""

    def __init__(self, name: str, python: str):
        self.name = name
        root = Path(__file__).parents[1]
        paths = [str(root), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [python, str(root / "scripts" / "moe_sides.py"), name],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
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
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def build(self, shape: Shape, dtype: str, experts_dtype: str, device: str) -> None:
        self.ask(build=asdict(shape), dtype=dtype, experts_dtype=experts_dtype, device=device)

    def output_and_gradient(self) -> Tensor:
        """[2, T, D]"""
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/saved.pt"
            self.ask(save=path)
            return torch.load(path, weights_only=True)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def start(peer_python: str) -> dict[str, Process]:
    """All sides; without TorchTitan's, and with a line that says why, where that is not there."""
    sides = {name: Process(name, sys.executable) for name in SIDES if name != "torchtitan"}
    try:
        peer = Process("torchtitan", peer_python)
    except OSError as error:
        print(f"torchtitan is left out: {error}")
        return sides
    try:
        peer.build(Shape(8, 16, 16, 4, 2), "float32", "float32", "cpu")
        return sides | {"torchtitan": peer}
    except RuntimeError as error:
        peer.close()
        print(
            f"{error}; it is left out. Install it, best in an environment of its own, and name "
            f"that one's Python with --peer-python"
        )
        return sides


# ---------------------------------------------------------------------------- measuring


def check_equal(shape: Shape, device: str, sides: dict[str, Process]) -> None:
    """Every peer computes what ours does; routers in float32, experts where they have a kernel.

    Raises:
        RuntimeError: one does not: the sides would not do the same work.
    """
    low = {"torchtitan"} | ({"grouped_mm"} if device == "cuda" else set())
    computed = {}
    for name in (name for name in sides if name != "dense"):
        sides[name].build(shape, "float32", "bfloat16" if name in low else "float32", device)
        computed[name] = sides[name].output_and_gradient()
    ours = computed.pop("ours")
    for name, values in computed.items():
        compare(name, values, ours, LOW if name in low else EXACT)


def compare(name: str, values: Tensor, ours: Tensor, limit: float) -> None:
    """`values` and `ours`: output and input gradient, [2, T, D]."""
    for what, a, b in zip(("output", "input gradient"), values, ours, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error < limit:
            raise RuntimeError(f"the {what} of {name} is off ours by {error:.1e}: nothing is timed")


def measure(shape: Shape, dtype: str, device: str, steps: int, sides: dict[str, Process]) -> dict:
    """One row: the median step of each side."""
    # Their experts always compute in bfloat16: in float32 they would do other work.
    sides = {n: s for n, s in sides.items() if n != "torchtitan" or dtype == "bfloat16"}
    for side in sides.values():
        side.build(shape, dtype, dtype, device)
        side.ask(warm_up=WARM_UP, seconds=2.0)
    seconds = interleaved(sides, steps)
    return {
        **asdict(shape),
        "dtype": dtype,
        "busiest_over_mean": busiest_over_mean(shape, device),
        "ms": {name: taken.both * 1e3 for name, taken in seconds.items()},
        "ratio": {name: taken.both / seconds["ours"].both for name, taken in seconds.items()},
        "tflops": {name: rates(shape, taken) for name, taken in seconds.items()},
    }


def interleaved(sides: dict[str, Process], steps: int) -> dict[str, Seconds]:
    """The median step of each; everyone's step i comes before anyone's step i + 1."""
    taken: dict[str, list[Seconds]] = {name: [] for name in sides}
    for i in range(steps):
        for name, side in sides.items():
            taken[name].append(Seconds(**side.ask(step=i)))
    return {
        name: sorted(all_, key=lambda seconds: seconds.both)[steps // 2]
        for name, all_ in taken.items()
    }


def busiest_over_mean(shape: Shape, device: str) -> float:
    x_TD = make_tokens(shape, 0, torch.float32, device)
    logits_TE = x_TD @ make_weights(shape, device).router_ED.t()
    load_E = logits_TE.topk(shape.top_k).indices.flatten().bincount(minlength=shape.experts)
    return (load_E.max() / load_E.double().mean()).item()


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
