"""FSDP2: parameters, gradients and optimizer state sharded over the data-parallel ranks.

One unit per transformer block, so that one block's parameters at a time are whole. FSDP2 is also
what keeps float32 masters beside bf16 compute: parameters live and are updated in float32, are
gathered in bf16, and their gradients are reduced in float32. That holds on a mesh of one rank too.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from titan_vlm.config import Config


def apply(model: nn.Module, mesh: DeviceMesh, config: Config) -> nn.Module:
    """Shard `model` in place over `mesh` and return it; a no-op where there is nothing to do."""
    half = config.training.dtype == "bfloat16"
    if mesh.size() == 1 and not half:
        return model
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32 if half else None,
        # The model picks its dtypes itself: rotary angles, for one, stay in float32.
        cast_forward_inputs=False,
    )
    kwargs = {"mesh": mesh, "mp_policy": policy}
    # On one rank there is no memory to win from gathering a second time.
    reshard = mesh.size() > 1
    for unit in model.sharding_units():
        fully_shard(unit, reshard_after_forward=reshard, **kwargs)
    fully_shard(model, reshard_after_forward=False, **kwargs)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is a sum divided by the global number of targets: gradients are summed.
            module.set_gradient_divide_factor(1.0)
            # Else a factor that is not the number of ranks becomes PREMUL_SUM, which gloo has not.
            module.set_force_sum_reduction_for_comms(True)
    return model
