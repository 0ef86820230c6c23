"""What a run reports: a line on the console, `metrics.jsonl`, TensorBoard; `moe_log.py` of experts.

Between two reports nothing waits for the device. Counts come from the host; loss, gradient norm
and expert loads stay tensors on the device until a report is due, and only then are they read.
Rates are over the wall time since the report before, without the time spent in `pause()`
(validation, checkpoints).
"""

import logging
import math
import re
import resource
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_vlm.config import Metrics
from titan_vlm.jsonl import open_until
from titan_vlm.training import moe_log

logger = logging.getLogger("titan_vlm")

# Peak TFLOP/s of dense bfloat16 products, by a part of the device's name; the first match holds.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "A100": 312.0,
    "B200": 2250.0,
}


class MetricsLogger:
    """Collects the counts of every step and reports each `log_every`-th.

    A training loop is, as far as metrics go:

        with metrics.waiting_for_data():
            batch = next(batches)
        metrics.count(tokens=..., positions=..., samples=..., images=..., flops=...)
        ...
        metrics.end_step(step, loss=loss, grad_norm=norm, learning_rates=rates, ...)
    """

    def __init__(
        self,
        directory: str | Path,
        config: Metrics,
        total_steps: int,
        device: torch.device,
        start_step: int = 0,
        world_size: int = 1,
        silent: bool = False,
        pp_ranks: int = 1,
        branches: dict[str, str] | None = None,
        ends: Collection[int] = (),
    ):
        """Reports to the console and to files in `directory`.

        Args:
            total_steps: of the run; 0: nobody knows.
            start_step: steps already done. What an earlier process reported after it is dropped
                from the files: those steps are about to run again.
            world_size: devices that share the work; MFU is per device.
            silent: write and print nothing, as every rank but the first does.
            pp_ranks: of a pipeline; each has some of the layers.
            branches: of each MoE layer: "text", "vision" or "projector".
            ends: further steps that are reported, the last ones of stages.
        """
        self.directory = Path(directory)
        self.config, self.total_steps, self.device = config, total_steps, device
        self.peak_tflops = world_size * (config.peak_tflops or known_peak(device))
        self.silent, self.pp_ranks, self.branches = silent, pp_ranks, branches or {}
        self.ends = ends
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        self._file = self._board = self._bar = self._moe = None
        self._warnings = moe_log.Warnings()
        if not self.silent:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = open_until(self.directory / "metrics.jsonl", start_step)
            self._moe = moe_log.MoELog(self.directory, start_step)
            if self.config.tensorboard:
                self._board = Board(_tensorboard(self.directory / "tensorboard", start_step))
            if sys.stderr.isatty():
                self._bar = _progress_bar(self.total_steps, start_step)
        self._counts = dict.fromkeys(("tokens", "positions", "samples", "images", "flops"), 0)
        self._data_wait = self._paused = 0.0
        self._since = self._step_since = time.perf_counter()

    def restart(self, step: int) -> None:
        """Go on from an earlier `step`, as a new process would."""
        self.close()
        self._open(step)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time the loader: its share of the wall time is reported."""
        start = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what happens inside out of the rates."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._paused += seconds
        self._step_since += seconds

    def count(
        self, *, tokens: int, positions: int, samples: int, images: int, flops: float
    ) -> None:
        """Add a micro-batch: `tokens` that are no padding among `positions` in its rows."""
        for name, value in locals().items():
            if name != "self":
                self._counts[name] += value

    def due(self, step: int) -> bool:
        """Whether `end_step` reports at `step`, counted from 1."""
        return step % self.config.log_every == 0 or step in (self.total_steps, *self.ends)

    def end_step(
        self,
        step: int,
        *,
        loss: Tensor | float,
        grad_norm: Tensor | float,
        learning_rates: dict[str, float],
        expert_loads: dict[str, Tensor] | None = None,
        routing: dict[str, dict[str, float]] | None = None,
        timings: dict[str, dict[str, float]] | None = None,
        skipped: dict[str, int] | None = None,
        sources: dict[str, dict[str, float]] | None = None,
        guards: dict[str, int] | None = None,
    ) -> dict[str, Any] | None:
        """Call after every step, counted from 1; returns the record where it reported one.

        Args:
            loss: of this very step, so that the curve of a resumed run is the same curve.
            learning_rates: by group.
            expert_loads: pairs per expert since the last report, by MoE layer.
            routing: what else there is to say of each of these layers.
            timings: and of their times in this very step.
            skipped: samples left out so far, by reason.
            sources: of each source of a mixture, what there is to say of it.
            guards: steps skipped, rows passed over and rollbacks so far.
        """
        if self._bar is not None:
            self._bar.update(1)
        if not self.due(step) or self.silent:
            self._step_since = time.perf_counter()
            return None
        record: dict[str, Any] = {"step": step, "loss": float(loss), "grad_norm": float(grad_norm)}
        record |= {f"lr/{name}": rate for name, rate in learning_rates.items()}
        record |= self._rates()  # after the reads above, which wait for the step to be done
        loads = {name: load_E.cpu() for name, load_E in (expert_loads or {}).items()}
        record |= self._of_experts(step, loads, routing or {}, timings or {}, record["step_ms"])
        record |= {f"skipped/{reason}": number for reason, number in (skipped or {}).items()}
        for name, figures in (sources or {}).items():
            record |= {f"source/{name}/{key}": x for key, x in figures.items()}
        record |= {f"guards/{name}": number for name, number in (guards or {}).items()}
        self._write(record)
        self.print(console_line(record, self.total_steps))
        return record

    def _of_experts(
        self, step: int, loads: dict[str, Tensor], routing: dict, timings: dict, step_ms: float
    ) -> dict[str, float]:
        """Report every layer in `moe.jsonl`; returns what goes into the step's record."""
        layers = moe_log.layer_figures(loads, routing, timings, step_ms)
        branches = moe_log.branch_figures(layers, self.branches, self.pp_ranks)
        self._moe.write(step, loads, layers, self._board)
        self._warnings.look(loads, branches)
        record = {
            f"experts/{name}/{there}": figures[here]
            for name, figures in layers.items()
            for here, there in moe_log.IN_METRICS.items()
        }
        for branch, figures in branches.items():
            record |= {f"moe/{branch}/{key}": x for key, x in figures.items()}
        losses = [x["balance_loss"] for x in branches.values() if "balance_loss" in x]
        return record | ({"balance_loss": sum(losses)} if losses else {})

    def report(self, step: int, values: dict[str, float], prefix: str = "eval") -> None:
        """Report values of another kind than a step's, validation's for instance."""
        self._write({"step": step, **{f"{prefix}/{name}": x for name, x in values.items()}})
        shown = " | ".join(f"{name} {x:.4f}" for name, x in values.items())
        self.print(f"{prefix:>4} {step:>{len(str(self.total_steps))}} | {shown}")

    def print(self, text: str) -> None:
        """Print above the progress bar where there is one."""
        if self.silent:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Finish the files and the bar."""
        for part in (self._file, self._moe, self._board, self._bar):
            if part is not None:
                part.close()

    def _rates(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._since - self._paused, 1e-9)
        counts = self._counts
        tflops = counts["flops"] / seconds / 1e12
        rates = {
            "tokens_per_s": counts["tokens"] / seconds,
            "samples_per_s": counts["samples"] / seconds,
            "images_per_s": counts["images"] / seconds,
            "padding": 1 - counts["tokens"] / max(counts["positions"], 1),
            "tflops": tflops,
            "memory_gib": _memory_gib(self.device),
            "data_wait": self._data_wait / seconds,
            "step_ms": (now - self._step_since) * 1e3,
        }
        if self.peak_tflops:
            rates["mfu"] = tflops / self.peak_tflops
        self._counts = dict.fromkeys(counts, 0)
        self._data_wait = self._paused = 0.0
        self._since = self._step_since = now
        return rates

    def _write(self, record: dict[str, Any]) -> None:
        if self.silent:
            return
        # The loss of a skipped step may be no number, which JSON cannot hold.
        known = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(known)
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])


class Board:
    """TensorBoard's writer, until the disk fails it: then it draws nothing more."""

    def __init__(self, writer: Any):
        self._writer = writer

    def add_scalar(self, *figure: Any) -> None:
        self._try("add_scalar", *figure)

    def add_image(self, *figure: Any) -> None:
        self._try("add_image", *figure)

    def close(self) -> None:
        self._try("close")

    def _try(self, what: str, *figure: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, what)(*figure)
        except OSError as error:  # of an earlier figure; its thread has ended
            logger.warning("TensorBoard gets no more events: %s", error)
            self._writer = None


def console_line(record: dict[str, Any], total_steps: int) -> str:
    """One aligned line; what a run does not have (images, experts, a known peak) is left out."""
    rates = [value for name, value in record.items() if name.startswith("lr/")]
    of = f"/{total_steps}" if total_steps else ""
    parts = [
        f"step {record['step']:>{len(str(total_steps))}}{of}",
        f"loss {record['loss']:7.4f}",
        f"grad {record['grad_norm']:7.3f}",
        f"lr {max(rates, default=0.0):.2e}",
        f"{record['tokens_per_s']:>9,.0f} tok/s",
        f"{record['samples_per_s']:6.1f} samples/s",
        f"{record['images_per_s']:6.1f} img/s",
        f"pad {record['padding']:5.1%}",
        f"{record['tflops']:7.2f} TFLOP/s",
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:5.1%}")
    parts += [f"{record['memory_gib']:5.1f} GiB", f"data {record['data_wait']:5.1%}"]
    branches = [name.split("/")[1] for name in record if re.fullmatch("moe/[^/]+/imbalance", name)]
    loads = [
        # Where there are experts in the text branch alone, nobody asks whose they are.
        ("" if branches == ["text"] else f"{branch} ")
        + f"{record[f'moe/{branch}/min']:.2f}-{record[f'moe/{branch}/imbalance']:.2f}"
        for branch in branches
    ]
    if loads:
        parts.append(f"experts {', '.join(loads)}")
    if drops := max((x for name, x in record.items() if name.endswith("/drop_rate")), default=0.0):
        parts.append(f"drops {drops:.1%}")
    skipped = sum(x for name, x in record.items() if name.startswith("skipped/"))
    if skipped:
        parts.append(f"skipped {skipped}")
    if steps := record.get("guards/skipped_steps"):
        parts.append(f"skipped steps {steps}")
    if rows := record.get("guards/passed_rows"):
        parts.append(f"rows passed over {rows}")
    return " | ".join(parts)


def known_peak(device: torch.device) -> float:
    """Peak TFLOP/s of dense bfloat16 products of a GPU that is known by name, else 0."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def _memory_gib(device: torch.device) -> float:
    """The most memory used so far: on CUDA allocated by PyTorch, on CPU resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS says bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _tensorboard(directory: Path, start_step: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=start_step + 1)


def _progress_bar(total_steps: int, start_step: int):
    from tqdm import tqdm

    return tqdm(total=total_steps or None, initial=start_step, unit="step", dynamic_ncols=True)
