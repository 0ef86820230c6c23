"""Expert parallelism: each rank of the `expert` view holds some experts of every MoE layer.

The weights of all experts are one DTensor, sharded over its first dimension; the layer's dispatcher
brings the tokens to them. Routers stay whole on every rank, and learn from all ranks' tokens what
balance and choices among the tokens of a sequence need.
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from titan_vlm import collectives
from titan_vlm import mesh as views
from titan_vlm.config import Parallelism
from titan_vlm.mesh import Mesh
from titan_vlm.models.moe.exchange import AllGatherDispatcher, AllToAllDispatcher
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.peers import Alone
from titan_vlm.parallel.local import compute_locally, shard_parameter

DISPATCHERS = {"all_to_all": AllToAllDispatcher, "allgather": AllGatherDispatcher}


def apply(model: nn.Module, mesh: Mesh, config: Parallelism) -> nn.Module:
    """Spread the experts of every MoE layer over `mesh.expert`; returns `model`."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        layer.router.batch_peers = _peers(mesh.tokens)
        layer.router.sequence_peers = _peers(mesh.tp)
    if views.size(mesh.expert) == 1:
        return model
    dispatcher = DISPATCHERS[config.dispatcher](mesh.expert.get_group())
    for layer in layers:
        layer.dispatcher = dispatcher
        for name, _ in list(layer.experts.named_parameters()):
            shard_parameter(layer.experts, name, mesh.expert, Shard(0))
        compute_locally(layer.experts, [Shard(0)])
    return model


def _peers(view: DeviceMesh | None) -> Alone:
    return Alone() if views.size(view) == 1 else Peers(view.get_group())


class Peers(Alone):
    """The ranks of a group."""

    def __init__(self, group: ProcessGroup):
        self.group, self.size = group, group.size()

    def sum(self, x: Tensor) -> Tensor:
        return collectives.all_reduce(x, self.group)

    def gather(self, x_P: Tensor) -> tuple[Tensor, slice]:
        own = torch.tensor([len(x_P)], device=x_P.device)
        lens = collectives.all_gather(own, 0, self.group).tolist()
        longest, before = max(lens), sum(lens[: self.group.rank()])
        padded = torch.cat((x_P, x_P.new_zeros(longest - len(x_P))))
        parts = collectives.all_gather(padded, 0, self.group).view(self.size, longest)
        joined = [part[:n] for part, n in zip(parts, lens, strict=True)]
        return torch.cat(joined), slice(before, before + len(x_P))
