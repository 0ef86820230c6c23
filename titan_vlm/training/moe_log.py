"""What a report says of the MoE layers: `moe.jsonl`, TensorBoard, sums by branch, warnings.

    {"step": 20, "layers": {"text.layers.0": {"load": [3, 1, ...], "imbalance": 1.5, ...}, ...}}

one line per report, every figure of every layer; `scripts/moe_report.py` makes a page of it.
`docs/moe.md` says what each figure is. `metrics.jsonl` has the sums by branch.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from titan_vlm.jsonl import open_until
from titan_vlm.training.heatmap import heat_map

logger = logging.getLogger("titan_vlm")
# Above these somebody should know.
A2A_SHARE = 0.3
DROP_RATE = 0.02
STARVED_REPORTS = 3  # an expert without a token in as many reports in a row
MOST_NAMED = 8  # experts in one warning

Layers = dict[str, dict[str, float]]  # figures by name, by layer


def layer_figures(
    loads: Mapping[str, Tensor],
    routing: Mapping[str, Mapping[str, float]],
    timings: Mapping[str, Mapping[str, float]],
    step_ms: float,
) -> Layers:
    """All there is to say of each layer, but for the load itself."""
    layers = {}
    for name, load_E in loads.items():
        summary = load_summary(load_E)
        figures = {
            "imbalance": summary["max"],
            "min": summary["min"],
            "entropy": summary["entropy"],
            **routing.get(name, {}),
            **timings.get(name, {}),
        }
        for kind in ("moe", "a2a"):
            if f"{kind}_ms" in figures:
                figures[f"{kind}_share"] = figures[f"{kind}_ms"] / step_ms
        layers[name] = figures
    return layers


def branch_figures(layers: Layers, branches: Mapping[str, str], pp_ranks: int) -> Layers:
    """By branch: the worst imbalance, the least load of an expert, the mean drop rate, and of the
    rest the sum over layers.

    Shares are of a rank's step on average: with a pipeline each rank has some of the layers.

    Args:
        branches: of each layer; without one it is "text".
    """
    found = {}
    for branch in dict.fromkeys(branches.get(name, "text") for name in layers):
        own = [x for name, x in layers.items() if branches.get(name, "text") == branch]

        def values(key: str, own: list[dict[str, float]] = own) -> list[float]:
            return [figures[key] for figures in own if key in figures]

        summary = {"imbalance": max(values("imbalance")), "min": min(values("min"))}
        if drops := values("drop_rate"):
            summary["drop_rate"] = sum(drops) / len(drops)
        for key in ("dead", "balance_loss"):
            if numbers := values(key):
                summary[key] = sum(numbers)
        for key in ("moe_share", "a2a_share"):
            if shares := values(key):
                summary[key] = sum(shares) / pp_ranks
        found[branch] = summary
    return found


def relative_load(counts_E: Tensor) -> Tensor:
    """Loads as multiples of an even share: 1 everywhere is perfect balance. Zeros if all are."""
    counts = counts_E.double()
    return counts * counts.shape[-1] / counts.sum(-1, keepdim=True).clamp(min=1)


def load_summary(counts_E: Tensor) -> dict[str, float]:
    """The least and the most loaded expert in even shares; the entropy, 1 where all are even."""
    load = relative_load(counts_E)
    share = load / load.shape[-1]
    entropy = torch.special.entr(share).sum().item() / max(math.log(load.shape[-1]), 1e-9)
    return {"min": load.min().item(), "max": load.max().item(), "entropy": entropy}


class MoELog:
    """`moe.jsonl` and the MoE layers' part of TensorBoard."""

    def __init__(self, directory: Path, start_step: int):
        """As `MetricsLogger`: what is reported after `start_step` is cut. There is no file before
        a layer is reported."""
        self._path, self._start_step = directory / "moe.jsonl", start_step
        self._file = open_until(self._path, start_step) if self._path.exists() else None

    def write(self, step: int, loads: Mapping[str, Tensor], layers: Layers, board) -> None:
        """Args: board: a SummaryWriter or None."""
        if not layers:
            return
        if self._file is None:
            self._file = open_until(self._path, self._start_step)
        lines = {name: {"load": loads[name].tolist(), **x} for name, x in layers.items()}
        self._file.write({"step": step, "layers": lines})
        if board is None:
            return
        for name, figures in layers.items():
            for key, value in figures.items():
                if key not in IN_METRICS:  # of those it has the scalars, too
                    board.add_scalar(f"experts/{name}/{key}", value, step)
        for size in sorted({load_E.numel() for load_E in loads.values()}):
            load_LE = torch.stack([x for x in loads.values() if x.numel() == size])
            board.add_image(f"experts/load of {size}", heat_map(relative_load(load_LE)), step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


# What metrics.jsonl has of each layer, and as what.
IN_METRICS = {"min": "min", "imbalance": "max", "entropy": "entropy"}


class Warnings:
    """Says once when something begins to go wrong, and again when it was well in between."""

    def __init__(self):
        self._said: set[str] = set()
        self._empty: dict[str, Tensor] = {}  # reports in a row that each expert had no token

    def look(self, loads: Mapping[str, Tensor], branches: Layers) -> None:
        """At the figures of one report.

        Args:
            branches: `branch_figures`.
        """
        wrong = {}
        share = sum(figures.get("a2a_share", 0.0) for figures in branches.values())
        if share > A2A_SHARE:
            wrong["exchanges"] = (
                f"exchanges between experts take {share:.0%} of the step, more than "
                f"{A2A_SHARE:.0%}: spread the experts over fewer ranks (parallelism.ep), within a "
                "node, or give each rank more tokens"
            )
        for branch, figures in branches.items():
            rate = figures.get("drop_rate", 0.0)
            if rate > DROP_RATE:
                wrong[f"drops of {branch}"] = (
                    f"{branch}: {rate:.1%} of the pairs of token and expert are dropped, more than "
                    f"{DROP_RATE:.0%}: raise moe.{branch}.capacity_factor or balance more"
                )
        for key, message in wrong.items():
            if key not in self._said:
                logger.warning(message)
        self._said = set(wrong)
        self._starved(loads)

    def _starved(self, loads: Mapping[str, Tensor]) -> None:
        for name, load_E in loads.items():
            if not load_E.any():
                continue  # nothing was routed there, no picture for instance
            empty_E = self._empty.get(name, torch.zeros_like(load_E))
            self._empty[name] = empty_E = (empty_E + 1) * (load_E == 0)
            # A count goes on growing, so that it is told once.
            if new := (empty_E == STARVED_REPORTS).nonzero().flatten().tolist():
                others = f" and {len(new) - MOST_NAMED} others" if len(new) > MOST_NAMED else ""
                logger.warning(
                    "%s: no token in %d reports in a row for expert%s %s%s: balance more "
                    "(docs/moe.md)",
                    name,
                    STARVED_REPORTS,
                    "s" if len(new) > 1 else "",
                    ", ".join(map(str, new[:MOST_NAMED])),
                    others,
                )
