"""Does a mesh train what one process trains? The same config, data and seed, side by side.

    scripts/check_parity.py --config X --meshes "ep=2,tp=2"      one mesh, or several behind ";"
    scripts/check_parity.py --config X --meshes quick|all         the lists of this file (quick: two
                                                                  steps of four meshes)

Every mesh runs on CPU with gloo, in float64 or --dtype float32. Loss, gradient norm, expert loads
and every gradient of each step, and every weight after the last, are compared with the single
process; the error of a tensor is max|a - b| / max(max|b|, floor), because some gradients are zero
plus roundoff. Without --config: a small model on samples with no image, one, and several of
different sizes. Exit status 0 only where every error is at most 1e-9 (float32: 1e-4, without the
weights); the last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from gloo_world import World
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from titan_vlm import train
from titan_vlm.assembly import assemble
from titan_vlm.config import load_config
from titan_vlm.errors import ConfigError
from titan_vlm.models.layers.head import whole
from titan_vlm.models.moe.placement import LogicalOrder
from titan_vlm.parallelize import make_plan

LIMITS = {"float64": 1e-9, "float32": 1e-4}
# Below this a gradient is taken for zero plus roundoff.
FLOOR = 1e-6
QUICK = ("dp_shard=2", "ep=2", "tp=2", "pp=2", "ep=2,tp=2")
ALL = (
    *QUICK,
    "dp_replicate=2",
    "dp_shard=4",
    "ep=4",
    "tp=2,sequence_parallel=false",
    "dp_shard=2,ep=2",
    "dp_shard=2,ep=2,moe.text.dispatcher=allgather",
    "dp_shard=2,tp=2",
    "dp_replicate=2,dp_shard=2",
    "dp_replicate=2,ep=2",
    "ep=2,tp=2,expert_parallel_over_tp=true",
    "ep=2,tp=2,sequence_parallel=false",
    "dp_shard=2,ep=2,tp=2",
    "dp_shard=2,ep=2,tp=2,expert_parallel_over_tp=true,sequence_parallel=false",
    "dp_replicate=2,dp_shard=2,ep=2,training.micro_batch_size=1",
    "dp_replicate=2,ep=2,tp=2",
    "dp_replicate=2,dp_shard=2,tp=2",
    "ep=2,tp=2,activation_checkpoint.mode=full",
    "tp=2,activation_checkpoint.mode=selective",
    "tp=2,compile.enable=true,compile.backend=aot_eager",
    "dp_shard=2,ep=2,compile.enable=true,compile.backend=aot_eager",
    "dp_shard=2,ep=2,cpu_offload=true",
    "dp_shard=2,ep=2,reshard_after_forward=never",
    "pp=2,dp_shard=2,reshard_after_forward=always",
    "tp=2,async_tp=true",
    "dp_shard=2,tp=2,async_tp=true,activation_checkpoint.mode=full",
    "pp=2,tp=2,async_tp=true,compile.enable=true,compile.backend=aot_eager",
    "pp=2,pp_schedule=GPipe",
    "pp=2,pp_schedule=Interleaved1F1B",
    "pp=2,pp_schedule=InterleavedZeroBubble",
    "pp=2,pp_schedule=ZBVZeroBubble",
    "pp=2,pp_schedule=DualPipeV",
    "pp=2,pp_schedule=Interleaved1F1B,pp_stages_per_rank=3,pp_microbatches=2",
    "pp=2,pp_split=text.layers.1",
    "pp=4",
    "pp=2,dp_shard=2",
    "pp=2,tp=2",
    "pp=2,ep=2",
    "pp=2,dp_replicate=2",
    "pp=2,tp=2,sequence_parallel=false,pp_schedule=InterleavedZeroBubble",
    "pp=2,ep=2,pp_schedule=ZBVZeroBubble",
    "pp=2,dp_shard=2,training.micro_batch_size=1,pp_schedule=DualPipeV",
    "pp=2,dp_shard=2,training.micro_batch_size=1,pp_microbatches=2",
    "pp=2,dp_shard=2,tp=2",
    "pp=2,ep=2,tp=2",
    "pp=2,ep=2,tp=2,expert_parallel_over_tp=true,pp_schedule=ZBVZeroBubble",
    "pp=2,dp_shard=2,ep=2,training.micro_batch_size=1",
    "pp=2,dp_replicate=2,dp_shard=2,training.micro_batch_size=1,pp_schedule=Interleaved1F1B",
    "pp=2,tp=2,activation_checkpoint.mode=full",
    "pp=2,dp_shard=2,activation_checkpoint.mode=selective,pp_schedule=Interleaved1F1B",
    "pp=2,dp_shard=2,compile.enable=true,compile.backend=aot_eager",
    "tp=2,compile.enable=true",
    "pp=2,ep=2,compile.enable=true",
    "pp=2,dp_shard=2,ep=2,tp=2,training.micro_batch_size=1",
)
AXES = ("pp", "dp_replicate", "dp_shard", "ep", "tp")
SMALL = {
    "model.flavor": "debug_moe",
    "moe.text.aux_loss": "0",
    "data.source": "openai",
    "data.min_pixels": "1024",
    "data.virtual_shards": "8",
    "data.pack_window": "4",
    "training.seq_len": "161",
    "training.steps": "5",
    "training.global_batch_size": "8",
    "training.micro_batch_size": "2",
    "training.max_norm": "0.5",
    "schedule.warmup_steps": "1",
    "optimizer.lr": "1e-3",
    "eval.every": "0",
    "checkpoint.every": "0",
    "checkpoint.export_hf": "false",
}


@dataclass
class Trace:
    """What a run computed. Tensors are whole, on rank 0 only."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)  # of routers: biases, averages
    images: list[int] = field(default_factory=list)  # of each micro-batch of rank 0's
    loads: list[dict[str, list[int]]] = field(default_factory=list)  # pairs of each expert
    routing: list[dict[str, float]] = field(default_factory=list)  # whatever else layers report

    # The part of MetricsLogger that a step calls.
    def waiting_for_data(self):
        return nullcontext()

    def count(self, **_):
        pass

    def due(self, step: int) -> bool:
        return True

    def end_step(self, step: int, loss: float, grad_norm: float, expert_loads, routing, **_):
        self.losses.append(loss)
        self.norms.append(grad_norm)
        self.loads.append({name: load_E.tolist() for name, load_E in expert_loads.items()})
        figures = {f"{name}.{key}": x for name, of in routing.items() for key, x in of.items()}
        self.routing.append(figures)


def record(words: list[str]) -> Trace:
    """Run all steps on this rank."""
    config = load_config(words[0], words[1:])
    run, trace = train.prepare(config), Trace()

    def keep(*_) -> None:
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in run.model.named_parameters()
        }
        trace.gradients.append(gathered(run, gradients))

    run.optimizer.register_step_pre_hook(keep)
    forward_backward = train.forward_backward

    def count_images(run, batches, targets):
        trace.images += [batch.num_images for batch in batches]
        return forward_backward(run, batches, targets)

    train.forward_backward = count_images
    try:
        for _ in range(config.training.steps):
            train.train_step(run, trace)
    finally:
        train.forward_backward = forward_backward
        run.loader.close()
    trace.weights = gathered(run, {n: p.detach() for n, p in run.model.named_parameters()})
    trace.buffers = gathered_buffers(run)
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
    return trace


def gathered(run: train.Run, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of all stages, experts in logical order, on rank 0."""
    slots = {name: b for name, b in run.model.named_buffers() if name.endswith("slots_E")}
    state = LogicalOrder(tensors | slots)
    state = run.pipeline.whole_state(state) if run.pipeline else state
    ranks: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(ranks, list(tensors))  # stages have others, and no gradient of buffers
    found = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        tensor = whole(state[name])
        if dist.get_rank() == 0:
            found[name] = tensor.clone()
    return found


def gathered_buffers(run: train.Run) -> dict[str, Tensor]:
    """The persistent buffers of all stages, on every rank."""
    names = dict(run.model.named_parameters())
    state = get_model_state_dict(run.model)
    here = {name: x.clone() for name, x in state.items() if name not in names}
    ranks: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, here)
    return {name: x for rank in ranks for name, x in rank.items()}


# ---------------------------------------------------------------------------- comparing


def error(a: Tensor, b: Tensor, floor: float = FLOOR) -> float:
    """The error measure of the numerics contract."""
    if a.shape != b.shape:
        return float("inf")
    if not b.numel():
        return 0.0
    return ((a - b).abs().max() / b.abs().max().clamp(min=floor)).item()


def compare(mesh: Trace, single: Trace) -> dict[str, tuple[float, str]]:
    """The worst error of losses, norms, gradients, weights and expert loads, and where it is.

    Loads are whole numbers: another one is an infinite error. (A routed padding token changes no
    gradient.)
    """
    pairs = zip(mesh.loads, single.loads, strict=True)
    wrong = [f"step {i}" for i, (ours, theirs) in enumerate(pairs) if ours != theirs]
    worst = {"loads": (float("inf") if wrong else 0.0, wrong[0] if wrong else "-")}
    for kind in ("losses", "norms"):
        pairs = zip(getattr(mesh, kind), getattr(single, kind), strict=True)
        errors = [(abs(a - b) / abs(b), f"step {i}") for i, (a, b) in enumerate(pairs)]
        worst[kind] = max(errors)
    errors = [(0.0, "-")]
    for step, (ours, theirs) in enumerate(zip(mesh.routing, single.routing, strict=True)):
        errors += [
            (abs(ours[name] - x) / max(abs(x), FLOOR), f"{name}, step {step}")
            for name, x in theirs.items()
        ]
    worst["routing"] = max(errors)
    errors = []
    for step, (ours, theirs) in enumerate(zip(mesh.gradients, single.gradients, strict=True)):
        errors += [(error(ours[n], theirs[n]), f"{n}, step {step}") for n in theirs]
    worst["gradients"] = max(errors)
    errors = [(error(mesh.weights[n], w), n) for n, w in single.weights.items()]
    errors += [(error(mesh.buffers[n], x), n) for n, x in single.buffers.items()]
    worst["weights"] = max(errors)
    return worst


def judged(dtype: str) -> tuple[str, ...]:
    """In float32 the weights are not: Adam divides by gradients that may be zero plus roundoff."""
    kinds = ("losses", "norms", "gradients", "loads", "routing")
    return (*kinds, "weights") if dtype == "float64" else kinds


# ---------------------------------------------------------------------------- meshes and data


def ranks_and_words(mesh: str) -> tuple[int, list[str]]:
    """ "ep=2,tp=2" as a number of processes and command-line words; other keys pass through.

    Raises:
        ConfigError: something that is not key=value.
    """
    ranks, words = 1, ["--parallelism.dp_shard", "1"]
    for item in filter(None, mesh.split(",")):
        key, equals, value = item.strip().partition("=")
        if not equals:
            raise ConfigError(f'--meshes: {item!r} is not key=value, as in "ep=2,tp=2"')
        if key in AXES:
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"--meshes: {key}: expected a number from 1 on, got {value!r}")
            ranks *= int(value)
        words += [f"--{key if '.' in key else f'parallelism.{key}'}", value]
    return ranks, words


def joint_micro_batch(words: list[str], changes: list[str]) -> int:
    """Rows that a mesh works on at a time, all ranks together. Balance looks at those, so that one
    process must take as many at a time to compute the same."""
    config = load_config(words[0], [*words[1:], *changes])
    degrees = config.parallelism
    readers = degrees.dp_replicate * max(degrees.dp_shard, 1) * degrees.ep
    return config.training.micro_batch_size * readers


def write_samples(folder: Path, count: int = 120) -> Path:
    """Conversations with no image, as most, or one, two or three of many sizes."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        parts = [{"type": "text", "text": f"Sample {i}. " + "What is shown here? " * (i % 4 + 1)}]
        for j in range((0, 0, 3, 0, 0, 1, 0, 0, 2, 0)[i % 10]):
            height, width = rng.integers(30, 90, 2)
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}-{j}.png")
            parts.append({"type": "image_url", "image_url": {"url": str(folder / f"{i}-{j}.png")}})
        answer = {"role": "assistant", "content": "Noise, " * (i % 7 + 1) + "nothing else."}
        lines.append(json.dumps({"messages": [{"role": "user", "content": parts}, answer]}))
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines))
    return path


def small_words(folder: Path) -> list[str]:
    """The words of the small run, its data written to `folder`."""
    settings = SMALL | {"data.path": str(write_samples(folder))}
    return ["qwen_vlm_moe.toml", *(w for k, v in settings.items() for w in (f"--{k}", v))]


def check(words: list[str], ranks: int) -> None:
    """Refuse a mesh that cannot be before anything runs (ConfigError)."""
    config = load_config(words[0], words[1:])
    make_plan(config, assemble(config), ranks)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="as of run_train.sh; default: the small run")
    parser.add_argument("--meshes", default="all", help='quick, all, or such as "ep=2,tp=2"')
    parser.add_argument("--dtype", choices=LIMITS, default="float64")
    parser.add_argument("--quick", action="store_true", help="the same as --meshes quick")
    arguments, others = parser.parse_known_args(argv)
    quick = arguments.quick or arguments.meshes == "quick"
    meshes = QUICK if quick else ALL if arguments.meshes == "all" else arguments.meshes.split(";")
    torch.set_num_threads(1)
    worst, world = 0.0, World()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            words = [arguments.config] if arguments.config else small_words(folder)
            words += ["--training.dtype", arguments.dtype, "--run.device", "cpu"]
            words += [*(("--training.steps", "2") if quick else ()), *others]
            words += ["--run.output_dir", str(folder / "single")]
            singles: dict[int, Trace] = {}
            asked = {m: ranks_and_words(m) for m in meshes}
            for ranks, changes in asked.values():
                check([*words, *changes], ranks)
            for mesh, (ranks, changes) in asked.items():
                rows = joint_micro_batch(words, changes)
                if rows not in singles:
                    singles[rows] = record([*words, "--training.micro_batch_size", str(rows)])
                output = ["--run.output_dir", str(folder / mesh)]
                trace = world.run(ranks, record, [*words, *changes, *output])[0]
                errors = compare(trace, singles[rows])
                print(f"{mesh:<40}", *(f"{k} {e:.1e} ({at})" for k, (e, at) in errors.items()))
                worst = max(worst, *(errors[kind][0] for kind in judged(arguments.dtype)))
    except ConfigError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    finally:
        world.close()
    limit = LIMITS[arguments.dtype]
    print(json.dumps({"max_error": worst, "limit": limit, "dtype": arguments.dtype}))
    return 0 if worst <= limit else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
