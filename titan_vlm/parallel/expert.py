"""Expert parallelism: each rank of the `expert` view holds some experts of every MoE layer.

The weights of all experts are one DTensor, sharded over its first dimension; the layer's dispatcher
brings the tokens to them. Routers stay whole on every rank.
"""

from torch import nn
from torch.distributed.tensor import Shard

from titan_vlm import mesh as views
from titan_vlm.config import Parallelism
from titan_vlm.mesh import Mesh
from titan_vlm.models.moe.exchange import AllGatherDispatcher, AllToAllDispatcher
from titan_vlm.models.moe.layer import MoE
from titan_vlm.parallel.local import compute_locally, shard_parameter

DISPATCHERS = {"all_to_all": AllToAllDispatcher, "allgather": AllGatherDispatcher}


def apply(model: nn.Module, mesh: Mesh, config: Parallelism) -> nn.Module:
    """Spread the experts of every MoE layer over `mesh.expert`; returns `model`."""
    if views.size(mesh.expert) == 1:
        return model
    dispatcher = DISPATCHERS[config.dispatcher](mesh.expert.get_group())
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.dispatcher = dispatcher
            for name, _ in list(layer.experts.named_parameters()):
                shard_parameter(layer.experts, name, mesh.expert, Shard(0))
            compute_locally(layer.experts, [Shard(0)])
    return model
