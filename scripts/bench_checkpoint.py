"""What saving costs: the steps around an asynchronous save, and a save beside plain `torch.save`.

A stack of linear layers of `--parameters` million float32 numbers with AdamW, so that a checkpoint
has three numbers for each. One process, one thread. Three measurements, taken in turn:

    steps       without any save, and with an asynchronous save begun before the first of
                `--around` steps: staging is in the first, writing beside the others
    save        synchronous, by the trainer's Checkpointer: files, checksums, fsync, rename
    torch.save  the same tensors in one file, and the same with fsync

Whatever is saved is written beside the save before, which is removed then: a disk cache gives room
that has just been freed several times faster than new.

Figures are medians over `--rounds`; the last line is one JSON object.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from titan_vlm.config import Checkpoint
from titan_vlm.training.checkpoint import Checkpointer
from titan_vlm.training.state import optimizer_tensors


class Toy:
    """A training step that takes a second or so, as one of this size does."""

    def __init__(self, millions: int, rows: int):
        width = 1024
        layers = max(1, round(millions * 1e6 / width**2))
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        for parameter in self.model.parameters():  # else the activations of 200 layers vanish
            nn.init.normal_(parameter, std=width**-0.5)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.x = torch.randn(rows, width)

    def step(self) -> None:
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=int, default=200, help="millions")
    parser.add_argument("--rows", type=int, default=512, help="rows of a step")
    parser.add_argument("--around", type=int, default=20, help="steps around an asynchronous save")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_argument("--quick", action="store_true", help="a small model, one round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.parameters, arguments.around, arguments.rounds = 4, 3, 1
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as the trainer does
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = measure(arguments, Path(folder))
    print(json.dumps(figures))


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    toy = Toy(arguments.parameters, arguments.rows)
    toy.step()
    state = toy.model, toy.optimizer, {}
    sync = Checkpointer(folder / "sync", Checkpoint(keep_latest_k=1))
    beside = Checkpointer(folder / "async", Checkpoint(keep_latest_k=1, async_save=True))
    plain, saving, staging, rest = [], [], [], []
    times: dict[str, list[float]] = {"save": [], "torch.save": [], "torch.save, fsync": []}
    for number in range(1, arguments.rounds + 1):
        plain += [timed(toy.step) for _ in range(arguments.around)]
        staging.append(timed(beside.save, number, *state))
        first = timed(toy.step)
        saving += [staging[-1] + first] + [timed(toy.step) for _ in range(arguments.around - 1)]
        rest.append(timed(beside.wait))
        times["save"].append(timed(sync.save, number, *state))
        for name, fsync in (("torch.save", False), ("torch.save, fsync", True)):
            times[name].append(timed(save_plainly, toy, folder / f"plain{fsync:d}.pt", fsync))
    sync.close()
    beside.close()
    size = sum(path.stat().st_size for path in (folder / "sync").rglob("*.distcp"))
    figures = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}",
        "bytes": size,
        "step_s": median(plain),
        "step_around_async_save_s": median(saving),
        "slower": median(saving) / median(plain) - 1,
        "mean_slower": sum(saving) / sum(plain) - 1,
        "staging_s": median(staging),
        "waited_after_s": median(rest),
        **{f"{name}_s": median(values) for name, values in times.items()},
    }
    figures["save_over_torch_save"] = figures["save_s"] / figures["torch.save_s"]
    figures["save_over_torch_save_fsync"] = figures["save_s"] / figures["torch.save, fsync_s"]
    print(
        f"{figures['machine']}: {size / 1e9:.2f} GB\n"
        f"step {figures['step_s']:.3f} s, around an asynchronous save "
        f"{figures['step_around_async_save_s']:.3f} s ({figures['slower']:+.1%}; mean "
        f"{figures['mean_slower']:+.1%}), staging {figures['staging_s']:.2f} s\n"
        + ", ".join(f"{name} {median(values):.2f} s" for name, values in times.items())
    )
    return figures


def timed(action: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def save_plainly(toy: Toy, path: Path, fsync: bool) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(toy.state(), file)
        if fsync:
            file.flush()
            os.fsync(file.fileno())
    temporary.rename(path)


if __name__ == "__main__":
    main()
