"""The 4D DeviceMesh and every view of it.

    world = pp x dp_replicate x dp_shard x ep x tp       tp innermost, then ep: inside a node

Every process group is a slice of one root mesh, or several of its axes flattened into one:

    view      axes                              who it connects
    batch     dp_replicate, dp_shard, ep        ranks that read different rows
    tokens    batch and tp                      ranks that hold different tokens in an MoE layer
    fsdp      dp_shard, ep                      the shards of a dense parameter
    tp        tp                                the shards of a matrix product or of a sequence
    expert    ep (or ep and tp)                 the experts of a layer
    efsdp     dp_shard and tp (or dp_shard)     the shards of an expert's parameter
    pp        pp                                the stages of the model; each has all other views

Eight ranks as dp_shard 2 x ep 2 x tp 2, each named by its number:

             ep 0      ep 1          fsdp, batch   [0 2 4 6] [1 3 5 7]
    dp 0    0   1     2   3          expert        [0 2] [1 3] [4 6] [5 7]
    dp 1    4   5     6   7          efsdp         [0 1 4 5] [2 3 6 7]
           tp 0 1    tp 0 1          tp            [0 1] [2 3] [4 5] [6 7]

For a dense layer `ep` is just more data parallelism. In an MoE layer every rank, along `tp` too,
holds other tokens; so the ranks that share an expert's weights are those of dp_shard and tp. With
`expert_parallel_over_tp` the experts are spread over ep x tp, and dp_shard alone shares them.

An axis of degree 1 is in no mesh and costs no process group, but for dp_shard: something must
hold a parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_vlm.config import Parallelism
from titan_vlm.errors import ConfigError

AXES = ("pp", "dp_replicate", "dp_shard", "ep", "tp")
# The settings behind a view, as a message names them.
NAMES = {"tp": "tp", "expert": "ep (x tp with expert_parallel_over_tp)"}


@dataclass(frozen=True)
class Mesh:
    """The root mesh and its views. `degrees` has a number for each of `AXES`."""

    root: DeviceMesh
    degrees: Mapping[str, int]
    expert_parallel_over_tp: bool

    @cached_property
    def batch(self) -> DeviceMesh:
        return self._flat("batch", ("dp_replicate", "dp_shard", "ep"))

    @cached_property
    def tokens(self) -> DeviceMesh:
        return self._flat("tokens", ("dp_replicate", "dp_shard", "ep", "tp"))

    @cached_property
    def pp(self) -> DeviceMesh | None:
        return self._flat("pp", ("pp",))

    @cached_property
    def tp(self) -> DeviceMesh | None:
        return self._flat("tp", ("tp",))

    @cached_property
    def expert(self) -> DeviceMesh | None:
        return self._flat("expert", ("ep", "tp") if self.expert_parallel_over_tp else ("ep",))

    @cached_property
    def fsdp(self) -> DeviceMesh:
        """One axis, or with replicas (HSDP) two: replicas, shards."""
        return self._replicated(self._flat("fsdp", ("dp_shard", "ep")))

    @cached_property
    def efsdp(self) -> DeviceMesh:
        """One axis, or with replicas (HSDP) two: replicas, shards."""
        axes = ("dp_shard",) if self.expert_parallel_over_tp else ("dp_shard", "tp")
        return self._replicated(self._flat("efsdp", axes))

    def across_nodes(self, per_node: int) -> list[str]:
        """The views, of those that should stay inside a node, that do not.

        Args:
            per_node: processes on each node.
        """
        views = {"tp": self.tp, "expert": self.expert}
        inner = {name: view.mesh.tolist() for name, view in views.items() if view is not None}
        return [
            f"{name} {ranks}"
            for name, ranks in inner.items()
            if len({rank // per_node for rank in ranks}) > 1
        ]

    def _flat(self, name: str, axes: tuple[str, ...]) -> DeviceMesh | None:
        """The axes as one axis; None where none of them is in the mesh."""
        present = tuple(axis for axis in axes if axis in self.root.mesh_dim_names)
        if not present:
            return None
        view = self.root[present]
        return view if len(present) == 1 else view._flatten(name)

    def _replicated(self, shards: DeviceMesh) -> DeviceMesh:
        if self.degrees["dp_replicate"] == 1:
            return shards
        return DeviceMesh._concatenate([self.root["dp_replicate"], shards])


def build_mesh(device_type: str, degrees: Mapping[str, int], over_tp: bool) -> Mesh:
    """The mesh of the running process group; its size is the product of `degrees`."""
    axes = [axis for axis in AXES if degrees[axis] > 1 or axis == "dp_shard"]
    shape = tuple(degrees[axis] for axis in axes)
    root = init_device_mesh(device_type, shape, mesh_dim_names=tuple(axes))
    return Mesh(root, degrees, over_tp)


def size(view: DeviceMesh | None) -> int:
    """Ranks in a view; 1 where there is none."""
    return 1 if view is None else view.size()


def rank(view: DeviceMesh | None) -> int:
    """This rank's place in a one-axis view."""
    return 0 if view is None else view.get_local_rank()


def group(view: DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group of a one-axis view."""
    return None if view is None else view.get_group()


# ---------------------------------------------------------------------------- the degrees


def resolve_degrees(config: Parallelism, world: int) -> dict[str, int]:
    """A number for each axis; `dp_shard = -1` becomes what the others leave of `world`.

    Raises:
        ConfigError: the degrees do not multiply to the number of processes.
    """
    degrees = {axis: getattr(config, axis) for axis in AXES}
    others = prod(degree for axis, degree in degrees.items() if axis != "dp_shard")
    if degrees["dp_shard"] == -1 and world % others == 0:
        return degrees | {"dp_shard": world // others}
    if degrees["dp_shard"] * others == world:
        return degrees
    known = {axis: degree for axis, degree in degrees.items() if degree != -1}
    total = " x ".join(f"{axis} {degree}" for axis, degree in known.items())
    raise ConfigError(
        f"[parallelism]: {total} = {prod(known.values())}, which does not "
        f"{'divide' if degrees['dp_shard'] == -1 else 'make'} the {world} processes started; "
        + _what_would(degrees, world)
    )


def _what_would(degrees: dict[str, int], world: int) -> str:
    """The smallest change of one degree that works."""
    choices = []
    for axis, degree in degrees.items():
        others = prod(abs(d) for a, d in degrees.items() if a not in (axis, "dp_shard"))
        fixed = 1 if axis == "dp_shard" else max(degrees["dp_shard"], 1)
        exact = degrees["dp_shard"] != -1 or axis == "dp_shard"
        for value in range(1, world + 1):
            product = value * others * fixed
            works = product == world if exact else world % product == 0
            if works and value != degree:
                choices.append((abs(value - max(degree, 1)), f"{axis} = {value}"))
    return (
        "use " + " or ".join(text for _, text in sorted(choices)[:2])
        if choices
        else ("set dp_shard = -1 and lower the others")
    )


def check_divides(degrees: Mapping[str, int], needs: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse a degree that does not divide what it splits.

    Args:
        needs: for "tp" and "expert", what is split among how many; `{"tp": {"heads": 32}}`.

    Raises:
        ConfigError: with the quotient and the nearest degrees that work.
    """
    for view, counts in needs.items():
        degree = degrees[view]
        for what, count in counts.items():
            if count % degree:
                good = [n for n in range(1, count + 1) if all(c % n == 0 for c in counts.values())]
                below = max(n for n in good if n < degree)
                above = min((n for n in good if n > degree), default=None)
                nearest = f"{below} or {above}" if above else str(below)
                raise ConfigError(
                    f"[parallelism]: {count} {what} over {NAMES[view]} = {degree} is "
                    f"{count / degree:.3g} each; use {nearest}"
                )
