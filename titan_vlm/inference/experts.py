"""Experts spread over ranks for inference, the busiest of them in more than one place.

Each rank has all other weights whole. Eight experts of the loads 6 6 2 2 1 1 1 1 on two ranks, as
they lie without redundant experts and with two (`models/moe/placement.py` finds the latter):

    redundant     rank 0         rank 1         pairs of the ranks
    0             0 1 2 3        4 5 6 7        16, 4
    2             4 5 1 1 2      3 0 0 6 7      10, 10

The pairs of an expert are dealt to its copies in turn, so that nothing that is computed changes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_vlm import mesh as views
from titan_vlm.errors import ConfigError
from titan_vlm.mesh import Mesh
from titan_vlm.models.moe.layer import moe_layers
from titan_vlm.models.moe.placement import balanced, imbalance, replicate_experts
from titan_vlm.parallel import expert


def spread_experts(
    model: nn.Module, mesh: Mesh, redundant: int, loads: Mapping[str, Tensor]
) -> None:
    """Spread the experts of a filled model over `mesh.expert`, for inference only.

    Args:
        redundant: slots that each MoE layer has beyond its experts, for copies.
        loads: pairs of each expert by layer, as measured; not looked at where `redundant` is 0.

    Raises:
        ConfigError: slots that do not divide over the ranks, or a layer without a load.
    """
    ranks = views.size(mesh.expert)
    if redundant and ranks == 1:
        raise ConfigError(
            f"{redundant} redundant experts: one process has all experts; start several, or none "
            "redundant"
        )
    for name, layer in moe_layers(model).items():
        experts = layer.router.num_experts
        if (experts + redundant) % ranks:
            nearest = -(-(experts + redundant) // ranks) * ranks - experts
            raise ConfigError(
                f"{redundant} redundant experts: {experts} experts of {name} and those are not "
                f"equally many for each of {ranks} processes; use {nearest}"
            )
        if redundant:
            load_E = loads.get(name)
            if load_E is None or len(load_E) != experts:
                raise ConfigError(
                    f"{redundant} redundant experts: no load of {name}'s {experts} experts has "
                    "been measured, by which to choose them"
                )
            replicate_experts(layer, balanced(load_E, ranks, experts + redundant))
    expert.apply(model, mesh)


def last_loads(output: Path) -> dict[str, Tensor]:
    """Pairs of each expert by layer, as a run last reported them.

    Raises:
        ConfigError: it reported none.
    """
    path = output / "moe.jsonl"
    try:
        layers = json.loads(path.read_text().splitlines()[-1])["layers"]
    except (OSError, IndexError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: expected the loads that a run reported: {error}") from error
    return {name: torch.tensor(figures["load"]) for name, figures in layers.items()}


@contextmanager
def rank_imbalance(model: nn.Module) -> Iterator[dict[str, float]]:
    """Fills in, at the end, largest / mean pairs that the ranks computed meanwhile, by layer."""
    found: dict[str, float] = {}
    layers = moe_layers(model)
    pairs = {name: torch.zeros((), dtype=torch.float64) for name in layers}

    def count_of(name: str):
        def hook(experts, args):
            pairs[name] += int((args[1].weights_R > 0).sum())  # the others are fillers

        return hook

    hooks = [m.experts.register_forward_pre_hook(count_of(name)) for name, m in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    if not layers:
        return
    everyone: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, [x.item() for x in pairs.values()])  # a number per layer
    for name, load_N in zip(layers, torch.tensor(everyone).T, strict=True):
        found[name] = imbalance(load_N)
