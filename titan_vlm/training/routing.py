"""What the routers of all layers do together: act after a step, report, be saved.

Ranks along `pp` have other layers, ranks of the `tokens` view other tokens of the same layers. An
exchange here is one flat tensor for all layers; ranks without one take part with zeros.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titan_vlm import distributed
from titan_vlm.mesh import Mesh, rank, size
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.layer import moe_layers
from titan_vlm.models.moe.router import SUMS, Router
from titan_vlm.models.moe.timing import COUNTS


class Layer(NamedTuple):
    """How many experts, how they are routed, and where: "text", "vision" or "projector"; and
    whether they are asleep."""

    num_experts: int
    config: MoEConfig
    branch: str
    asleep: bool = False


Layers = Mapping[str, Layer]  # by name, of all stages


def all_layers(whole: nn.Module) -> Layers:
    """Of the whole model, before a pipeline cuts it."""
    branch_of = {name: branch for branch, names in whole.branches().items() for name in names}
    return {
        name: Layer(
            router.num_experts,
            router.config,
            branch_of[f"{name}.moe.router.weight"],
            router.asleep,
        )
        for name, router in routers_of(whole).items()
    }


def routers_of(model: nn.Module) -> dict[str, Router]:
    """Those of this rank, by the names of their layers."""
    return {name: layer.router for name, layer in moe_layers(model).items()}


def broken(model: nn.Module, layers: Layers, device: torch.device) -> Tensor:
    """[L] for each of `layers`, of all stages: above 0 where this rank has seen logits in this
    step that are not finite."""
    routers = routers_of(model)
    zero = torch.zeros(1, dtype=torch.float64, device=device)
    flags = [routers[name].broken if name in routers else zero for name in layers]
    return torch.cat(flags) if flags else zero[:0]


@torch.no_grad()
def steer(model: nn.Module, mesh: Mesh) -> None:
    """Once per step, after the last backward pass: biases and thresholds move."""
    # A frozen router stays as it is.
    steered = [
        router.steering
        for router in routers_of(model).values()
        if router.steering is not None and router.weight.requires_grad
    ]
    if not steered:
        return
    flat = torch.cat([steering.pending for steering in steered])
    flat = distributed.sum_over(mesh.tokens, flat)
    totals = flat.split([steering.pending.numel() for steering in steered])
    for steering, total in zip(steered, totals, strict=True):
        steering.update(total)
        steering.pending.zero_()


def counted(model: nn.Module) -> list[Tensor]:
    """What routers have counted, before a step that may be skipped."""
    return [buffer.clone() for buffer in _counting(model)]


@torch.no_grad()
def forget(model: nn.Module, before: list[Tensor] | None = None) -> None:
    """Let a step leave no trace: counters are again as `counted` had them (None: zero)."""
    now = _counting(model)
    for buffer, value in zip(now, before or map(torch.zeros_like, now), strict=True):
        buffer.copy_(value)
    for layer in moe_layers(model).values():
        layer.router.broken.zero_()
        if layer.router.steering is not None:
            layer.router.steering.pending.zero_()
        layer.clock.reset()


def _counting(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for router in routers_of(model).values()
        for buffer in (router.load_E, router.placed_E, router.sums)
    ]


@dataclass(frozen=True)
class Figures:
    """Of one layer over all ranks, since the last report: pairs of each expert before drops, and
    `SUMS` by name.

    Of the reported step alone, and depending on the mesh: milliseconds of each rank that has the
    layer, in it (`moe_ms`) and in its exchanges (`a2a_ms`), and `COUNTS`, summed over those ranks.
    """

    load_E: Tensor
    sums: dict[str, float]
    moe_ms: list[float] = field(default_factory=list)
    a2a_ms: list[float] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)

    def timing(self) -> dict[str, float]:
        """What is reported of the last two lines: times and counts as means over the ranks, and
        the share of the experts' rows that are fillers. No `a2a_` where nothing is exchanged,
        no bytes where only the device knows them."""
        counts, ranks = self.counts, len(self.moe_ms)
        values = {
            "moe_ms": sum(self.moe_ms) / ranks,
            "moe_ms_max": max(self.moe_ms),
            "moe_calls": counts["moe_calls"] / ranks,
            "padding": 1 - counts["pairs"] / counts["rows"] if counts["rows"] else 0.0,
        }
        if counts["a2a_calls"]:
            values["a2a_ms"] = sum(self.a2a_ms) / ranks
            values["a2a_ms_max"] = max(self.a2a_ms)
            values["a2a_calls"] = counts["a2a_calls"] / ranks
        if counts["a2a_bytes"]:
            values["a2a_bytes"] = counts["a2a_bytes"] / ranks
        return values

    def summary(self, config: MoEConfig, step: int) -> dict[str, float]:
        """What is reported beside the load, and `balance_loss`, what the losses add to the
        model's loss."""
        sums = self.sums
        batches, tokens = max(sums["micro_batches"], 1e-9), max(sums["tokens"], 1)
        observed = max(sums["observed"], 1)
        values = {
            "dead": float((self.load_E == 0).sum()),
            "gate_entropy": sums["entropy"] / observed,
            "logit_rms": (sums["square"] / observed) ** 0.5,
        }
        if config.capacity_factor:
            values["drop_rate"] = 1 - sums["kept"] / max(sums["made"], 1)
        if sums["lonely"] or config.router == "threshold":
            values["without_expert"] = sums["lonely"] / tokens
        losses = {name: sums[name] / batches for name in config.losses}
        if losses:
            values |= losses
            values["balance_loss"] = sum(
                config.coefficient(name, step) * value for name, value in losses.items()
            )
        return values


@torch.no_grad()
def collect(
    model: nn.Module, layers: Layers, mesh: Mesh, device: torch.device
) -> dict[str, Figures]:
    """Each layer's figures since this was last asked for, but for those that are asleep."""
    if not layers:
        return {}
    here, clocks_LC = counters(model), _read_clocks(model, layers, mesh)
    sizes = [layer.num_experts + len(SUMS) for layer in layers.values()]
    empty = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]
    parts = [here.get(name, zeros)[: len(zeros)] for name, zeros in zip(layers, empty, strict=True)]
    flat = torch.cat([*parts, clocks_LC.flatten().to(device)])
    flat = distributed.sum_over(mesh.pp, distributed.sum_over(mesh.tokens, flat)).cpu()
    *parts, clocks = flat.split([*sizes, clocks_LC.numel()])
    rows = clocks.view_as(clocks_LC).tolist()
    for layer in moe_layers(model).values():
        layer.router.load_E.zero_()
        layer.router.sums.zero_()
        layer.clock.reset()
    figures, ranks = {}, size(mesh.tokens)
    for (name, (experts, *_, asleep)), part, row in zip(layers.items(), parts, rows, strict=True):
        if asleep:
            continue
        sums = dict(zip(SUMS, part[experts:].tolist(), strict=True))
        figures[name] = Figures(
            part[:experts].long(),
            sums,
            moe_ms=row[:ranks],
            a2a_ms=row[ranks : 2 * ranks],
            counts=dict(zip(COUNTS, row[2 * ranks :], strict=True)),
        )
    return figures


def _read_clocks(model: nn.Module, layers: Layers, mesh: Mesh) -> Tensor:
    """A row for each of `layers`: two times for each rank, of which this rank fills in its own, so
    that their sums over ranks are the times of all; and `COUNTS`."""
    ranks, me = size(mesh.tokens), rank(mesh.tokens)
    clocks_LC = torch.zeros(len(layers), 2 * ranks + len(COUNTS), dtype=torch.float64)
    here = moe_layers(model)
    for row, name in enumerate(layers):
        if name in here:
            (moe_ms, a2a_ms), counts = here[name].clock.read()
            clocks_LC[row, me], clocks_LC[row, ranks + me] = moe_ms, a2a_ms
            clocks_LC[row, 2 * ranks :] = torch.tensor(counts, dtype=torch.float64)
    return clocks_LC


def counters(model: nn.Module) -> dict[str, Tensor]:
    """By layer of this rank, what it has counted, as one float64 tensor."""
    return {
        name: torch.cat((router.load_E.double(), router.sums, router.placed_E.double()))
        for name, router in routers_of(model).items()
    }


@torch.no_grad()
def add_counters(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Go on from what `counters` returned when a run was saved."""
    for name, router in routers_of(model).items():
        if name in saved:
            sizes = [router.num_experts, len(SUMS), router.num_experts]
            load_E, sums, placed_E = saved[name].to(router.sums).split(sizes)
            router.load_E += load_E.long()
            router.placed_E += placed_E.long()
            router.sums += sums


@torch.no_grad()
def loads_to_place(model: nn.Module, mesh: Mesh) -> dict[str, Tensor]:
    """By layer of this stage, pairs of each expert on all ranks since this was last asked for."""
    routers = routers_of(model)
    if not routers:
        return {}
    flat = torch.cat([router.placed_E for router in routers.values()])
    flat = distributed.sum_over(mesh.tokens, flat).cpu()
    for router in routers.values():
        router.placed_E.zero_()
    sizes = [router.num_experts for router in routers.values()]
    return dict(zip(routers, flat.split(sizes), strict=True))
