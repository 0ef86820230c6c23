"""torch.compile, block by block.

Compiled one by one, equal blocks share one graph and compile once. Only the `forward` of a block is
replaced, on the instance, so that parameter names do not change and the hooks of FSDP2 stay outside
of the graph.

Activation checkpointing comes after it, around the compiled forward. The other way round PyTorch
leaves a block wholly uncompiled, without a word, as soon as anything in it breaks the graph, and
the routing of an MoE layer does.
"""

import torch
from torch import nn

from titan_vlm.config import Compile

# (training, evaluation) x (first sizes, dynamic sizes) x the parts between graph breaks, of code
# that all blocks share; PyTorch's default of 8 variants would leave the rest uncompiled.
_VARIANTS = 64


def apply(model: nn.Module, config: Compile) -> nn.Module:
    """Compile the forward of each block (`model.blocks()`); returns `model`.

    Comes before activation checkpointing and sharding.
    """
    if not config.enable:
        return model
    torch._dynamo.config.recompile_limit = _VARIANTS
    for _, block in model.blocks():
        block.forward = torch.compile(block.forward, backend=config.backend)
    return model
