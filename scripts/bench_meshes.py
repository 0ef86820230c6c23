"""A whole training step on two processes of one thread each, beside one process of two threads.

The trainer itself (`train.train_step`) on the same rows: dp 2, ep 2, tp 2 and pp 2 against the
single process, on CPU over gloo, where all share the same two cores. So a ratio of 1 says that
splitting cost nothing; above it are exchanges, waiting for one another, and with pp the bubble.
Figures are medians over the steps of the slower rank; the last line is one JSON object.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from gloo_world import World

from titan_vlm import train
from titan_vlm.config import load_config
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig, to_hf

MESHES = {
    "one process": {},
    "dp 2": {"dp_shard": "2"},
    "ep 2": {"ep": "2"},
    "tp 2": {"tp": "2"},
    "pp 2": {"pp": "2"},
    "pp 2, zero bubble": {"pp": "2", "pp_schedule": "ZBVZeroBubble"},
}
# Large enough that products and not Python decide.
MODEL = Qwen3VLConfig(
    TextConfig(
        vocab_size=4096,
        hidden_size=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=1536,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
        mrope_section=(12, 10, 10),
        max_positions=4096,
    ),
    VisionConfig(
        depth=4,
        hidden_size=256,
        intermediate_size=1024,
        num_heads=4,
        out_hidden_size=512,
        num_positions=256,
        deepstack_layers=(1, 2),
    ),
)
SETTINGS = {
    "model.flavor": "hf",
    "moe.text.aux_loss": "0",
    "data.min_pixels": "65536",  # 64 visual tokens a picture
    "data.virtual_shards": "8",
    "training.seq_len": "256",
    "training.global_batch_size": "8",
    "training.micro_batch_size": "1",
    "training.dtype": "bfloat16",
    "run.device": "cpu",
    "checkpoint.every": "0",
    "checkpoint.export_hf": "false",
    "eval.every": "0",
}


class Quiet:
    """The part of MetricsLogger that a step calls, and the clock of the data loader."""

    def __init__(self):
        self.waited = 0.0

    def waiting_for_data(self):
        return self

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        self.waited += time.perf_counter() - self.start

    def count(self, **_):
        pass

    def due(self, step):
        return False

    def end_step(self, step, **_):
        pass


def measure(words: list[str], threads: int, steps: int) -> list[float]:
    """Seconds of each step on this rank, without reading data; three warm-up steps are left out."""
    torch.set_num_threads(threads)
    run, taken = train.prepare(load_config("qwen_vlm_moe.toml", words)), []
    for _ in range(steps + 3):
        metrics = Quiet()
        dist.barrier()
        start = time.perf_counter()
        train.train_step(run, metrics)
        taken.append(time.perf_counter() - start - metrics.waited)
    return taken[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each mesh")
    parser.add_argument("--quick", action="store_true", help="two steps of each")
    arguments = parser.parse_args()
    steps = 2 if arguments.quick else arguments.steps
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}; {SETTINGS['training.global_batch_size']} rows x "
        f"{SETTINGS['training.seq_len']} tokens a step, bfloat16"
    )
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(to_hf(MODEL)))
        for mesh, axes in MESHES.items():
            settings = SETTINGS | {"model.hf_path": name, "run.output_dir": str(folder / mesh)}
            settings |= {"training.steps": str(steps + 3), "schedule.warmup_steps": "0"}
            settings |= {f"parallelism.{key}": value for key, value in axes.items()}
            words = [word for key, value in settings.items() for word in (f"--{key}", value)]
            ranks = 2 if axes else 1
            world = World()  # a world of its own: no memory or thread of another mesh remains
            try:
                times = world.run(ranks, measure, words, 3 - ranks, steps)
            finally:
                world.close()
            seconds[mesh] = median(map(max, zip(*times, strict=True)))
            ratio = seconds[mesh] / seconds["one process"]
            print(f"{mesh:<20} {seconds[mesh]:7.3f} s   {ratio:5.2f} x", flush=True)
    alone = seconds.pop("one process")
    print(json.dumps({f"ratio_{mesh}": taken / alone for mesh, taken in seconds.items()}))


if __name__ == "__main__":
    main()
