"""FSDP2 and HSDP: parameters, gradients and optimizer state sharded over data-parallel ranks.

One unit per transformer block, so that one block's parameters at a time are whole. The experts of
a block are a unit of their own: fewer ranks share them (`mesh.efsdp`, the others hold other
experts), and in an MoE layer the ranks along `tp` hold different tokens, so that reducing over
`efsdp` sums their gradients as well.

While a block runs, the next one is gathered (in the backward pass the one before), its experts
with it.

FSDP2 is also what keeps float32 masters beside bf16 compute: parameters live and are updated in
float32, are gathered in bf16, and their gradients are reduced in float32. That holds on a mesh of
one rank too.
"""

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import register_dataclass

from titan_vlm.config import Config
from titan_vlm.mesh import Mesh
from titan_vlm.models.moe.experts import Experts
from titan_vlm.models.moe.router import Router
from titan_vlm.models.moe.routing import Routing

# A router is a unit of its own in bf16. FSDP2 gathers it again for the backward pass by a hook on
# the tensors of its output, for which older PyTorch looks into pytrees only.
register_dataclass(Routing)
# The output of the experts is a view, and nobody writes to it.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def apply(model: nn.Module, mesh: Mesh, config: Config) -> nn.Module:
    """Shard `model` in place over `mesh` and return it; a no-op where there is nothing to do."""
    half, offload = config.training.dtype == "bfloat16", config.parallelism.cpu_offload
    if mesh.tokens.size() == 1 and not half and not offload:
        return model
    policies: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            # The model picks its dtypes itself: rotary angles, for one, stay in float32.
            cast_forward_inputs=False,
        )
    }
    if offload:
        policies["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.root.device_type == "cuda")
    wish = config.parallelism.reshard_after_forward
    # A pipeline runs several micro-batches forward before the first comes back.
    reshard = wish == "always" or (wish == "auto" and mesh.pp is None)
    for unit in model.modules():
        if isinstance(unit, Experts):
            _shard(unit, mesh.efsdp, policies, reshard)
        if isinstance(unit, Router) and half:
            # Its product is computed in float32: rounded weights would make other choices.
            exact = {**policies, "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)}
            _shard(unit, mesh.fsdp, exact, reshard)
    for unit in model.sharding_units():
        _shard(unit, mesh.fsdp, policies, reshard)
    _shard(model, mesh.fsdp, policies, reshard=False)
    if mesh.pp is None and mesh.tokens.size() > 1:
        _prefetch([block for _, block in model.blocks()])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is a sum divided by the global number of targets: gradients are summed.
            module.set_gradient_divide_factor(1.0)
            # Else a factor that is not the number of ranks becomes PREMUL_SUM, which gloo has not.
            module.set_force_sum_reduction_for_comms(True)
    return model


def _prefetch(blocks: list[nn.Module]) -> None:
    """Have each block gather what runs after it, in either direction."""
    units = [[m for m in block.modules() if isinstance(m, FSDPModule)] for block in blocks]
    for i, block in enumerate(blocks):
        if i + 1 < len(blocks):
            block.set_modules_to_forward_prefetch(units[i + 1])
        if i > 0:
            block.set_modules_to_backward_prefetch(units[i - 1])


def _shard(unit: nn.Module, mesh: DeviceMesh, policies: dict[str, Any], reshard: bool) -> None:
    ranks = mesh.size(-1)
    fully_shard(
        unit,
        mesh=mesh,
        # On one rank there is no memory to win from gathering a second time.
        reshard_after_forward=reshard and ranks > 1,
        shard_placement_fn=lambda parameter: _shard_dimension(parameter, ranks),
        **policies,
    )


def _shard_dimension(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Experts are sharded over a dimension that divides: they are few, their matrices are large."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if local.ndim < 3:
        return None  # the first dimension
    return next((Shard(d) for d in range(local.ndim) if local.shape[d] % ranks == 0), None)
