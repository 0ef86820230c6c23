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
from titan_vlm.errors import ConfigError
from titan_vlm.mesh import Mesh
from titan_vlm.models.moe import fused_exchange
from titan_vlm.models.moe.config import RAGGED
from titan_vlm.models.moe.exchange import AllGatherDispatcher, AllToAllDispatcher
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.peers import Alone
from titan_vlm.parallel.local import compute_locally, shard_parameter


def apply(model: nn.Module, mesh: Mesh) -> nn.Module:
    """Spread the experts of every MoE layer over `mesh.expert`; returns `model`."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        layer.router.batch_peers = _peers(mesh.tokens)
        layer.router.sequence_peers = _peers(mesh.tp)
    if views.size(mesh.expert) == 1:
        return model
    for layer in layers:
        layer.dispatcher = make_dispatcher(layer, mesh.expert.get_group())
        for name, _ in list(layer.experts.named_parameters()):
            shard_parameter(layer.experts, name, mesh.expert, Shard(0))
        compute_locally(layer.experts, [Shard(0)])
    return model


def make_dispatcher(layer: MoE, group: ProcessGroup):
    """What brings the tokens of `layer` to the ranks of `group`, as its configuration says.

    Raises:
        ConfigError: no such dispatcher can run here; says why, and which can.
    """
    config, router = layer.router.config, layer.router
    match config.dispatcher:
        case "local":
            raise ConfigError(
                f'dispatcher = "local" of {router.name}: the experts are spread over '
                f'{group.size()} ranks (parallelism.ep); use "all_to_all", or ep = 1'
            )
        case "all_to_all":
            return AllToAllDispatcher(group)
        case "allgather":
            return AllGatherDispatcher(group)
        case library:
            most = router.num_experts if config.router in RAGGED else router.top_k
            width = layer.experts.first.shape[1]
            return fused_exchange.make_dispatcher(library, group, width, most, config.fused)


def _peers(view: DeviceMesh | None) -> Alone:
    return Alone() if views.size(view) == 1 else Peers(view.get_group())


class Peers(Alone):
    """The ranks of a group."""

    def __init__(self, group: ProcessGroup):
        self.group, self.size = group, group.size()

    def sum(self, x: Tensor) -> Tensor:
        return collectives.all_reduce(x, self.group)

    def gather(self, *columns_P: Tensor) -> tuple[list[Tensor], slice]:
        # Once for all columns: the host waits for the lengths.
        num_rows = len(columns_P[0])
        own = torch.tensor([num_rows], device=columns_P[0].device)
        lens = collectives.all_gather(own, 0, self.group).tolist()
        before = sum(lens[: self.group.rank()])
        joined = [self._join(column_P, lens) for column_P in columns_P]
        return joined, slice(before, before + num_rows)

    def _join(self, x_P: Tensor, lens: list[int]) -> Tensor:
        longest = max(lens)
        padded = torch.cat((x_P, x_P.new_zeros(longest - len(x_P))))
        parts = collectives.all_gather(padded, 0, self.group).view(self.size, longest)
        return torch.cat([part[:n] for part, n in zip(parts, lens, strict=True)])
