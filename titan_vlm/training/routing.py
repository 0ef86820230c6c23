"""What the routers of all layers do together: act after a step, report, be saved.

Ranks along `pp` have other layers, ranks of the `tokens` view other tokens of the same layers. An
exchange here is one flat tensor for all layers; ranks without one take part with zeros.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titan_vlm import distributed
from titan_vlm.errors import NumericsError
from titan_vlm.mesh import Mesh
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.layer import moe_layers
from titan_vlm.models.moe.router import SUMS, Router

# Layer -> its experts, and how they are routed; of all stages.
Layers = Mapping[str, tuple[int, MoEConfig]]


def all_layers(whole: nn.Module) -> Layers:
    """Of the whole model, before a pipeline cuts it."""
    routers = routers_of(whole).items()
    return {name: (router.num_experts, router.config) for name, router in routers}


def routers_of(model: nn.Module) -> dict[str, Router]:
    """Those of this rank, by the names of their layers."""
    return {name: layer.router for name, layer in moe_layers(model).items()}


@torch.no_grad()
def steer(model: nn.Module, layers: Layers, mesh: Mesh, device: torch.device, step: int) -> None:
    """Once per step, after the last backward pass: biases and thresholds move.

    Waits for the device once, to learn whether all logits were finite.

    Raises:
        NumericsError: one was not; names the layer and the step. No weight has changed.
    """
    if not layers:
        return
    routers = routers_of(model)
    zero = torch.zeros(1, dtype=torch.float64, device=device)
    broken = [routers[name].broken if name in routers else zero for name in layers]
    steered = [router.steering for router in routers.values() if router.steering is not None]
    flat = torch.cat([*broken, *(steering.pending for steering in steered)])
    flat = distributed.sum_over(mesh.tokens, flat)
    flags, *totals = flat.split([len(broken), *(x.pending.numel() for x in steered)])
    flags = distributed.sum_over(mesh.pp, flags.clone()).tolist()
    bad = [name for name, flag in zip(layers, flags, strict=True) if flag]
    if bad:
        others = f" and of {len(bad) - 1} other layers" if len(bad) > 1 else ""
        raise NumericsError(
            f"step {step}: router logits of {bad[0]}{others} are not finite; the weights are still "
            "those of the step before: lower optimizer.lr, or look at this step's samples"
        )
    for steering, total in zip(steered, totals, strict=True):
        steering.update(total)
        steering.pending.zero_()


@dataclass(frozen=True)
class Figures:
    """Of one layer, since the last report, over all ranks: pairs of each expert before drops, and
    `SUMS` by name."""

    load_E: Tensor
    sums: dict[str, float]

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
    model: nn.Module, layers: Layers, mesh: Mesh, device: torch.device, reset: bool = True
) -> dict[str, Figures]:
    """Each layer's figures since they were last `reset`."""
    if not layers:
        return {}
    here = counters(model)
    sizes = [experts + len(SUMS) for experts, _ in layers.values()]
    empty = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]
    flat = torch.cat([here.get(name, zeros) for name, zeros in zip(layers, empty, strict=True)])
    flat = distributed.sum_over(mesh.pp, distributed.sum_over(mesh.tokens, flat)).cpu()
    for router in routers_of(model).values() if reset else ():
        router.load_E.zero_()
        router.sums.zero_()
    figures = {}
    for (name, (experts, _)), part in zip(layers.items(), flat.split(sizes), strict=True):
        sums = dict(zip(SUMS, part[experts:].tolist(), strict=True))
        figures[name] = Figures(part[:experts].long(), sums)
    return figures


def counters(model: nn.Module) -> dict[str, Tensor]:
    """By layer of this rank, its loads and sums as one float64 tensor."""
    routers = routers_of(model).items()
    return {name: torch.cat((router.load_E.double(), router.sums)) for name, router in routers}


@torch.no_grad()
def add_counters(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Go on from what `counters` returned when a run was saved."""
    for name, router in routers_of(model).items():
        if name in saved:
            load_E, sums = saved[name].to(router.sums).split([router.num_experts, len(SUMS)])
            router.load_E += load_E.long()
            router.sums += sums
