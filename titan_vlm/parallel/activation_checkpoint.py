"""Activation checkpointing: the backward pass computes again what the forward pass did not keep.

    none        keep everything
    full        keep the input of each block, run the whole block again
    layers      the same for every n-th block of a branch only
    selective   keep what matrix products and attention returned, run everything cheap again

Only the `forward` of a block is replaced, on the instance: no wrapper module, so parameter names,
state dicts and the hooks of FSDP2 stay as they are.

In compiled blocks, selective keeps the products between the graphs (grouped ones, attention that
is not compiled) and runs each graph again as a whole.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from titan_vlm.config import ActivationCheckpoint
from titan_vlm.models.moe import timing
from titan_vlm.models.moe.tokens import runs_again

# By name: some are registered only once their module is imported.
_KEPT_BY_SELECTIVE = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "aten::_scaled_grouped_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
}


def apply(model: nn.Module, config: ActivationCheckpoint) -> nn.Module:
    """Replace the forward of the blocks (`model.blocks()`) as `config` says; returns `model`.

    Comes after compiling, before sharding.
    """
    if config.mode == "none":
        return model
    keep = {}
    if config.mode == "selective":
        keep["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for name, block in model.blocks():
        # The number in the name and not a running count, which a pipeline stage would begin anew.
        if config.mode == "layers" and int(name.rsplit(".", 1)[1]) % config.every:
            continue
        block.forward = _checkpointed(block.forward, keep)
    return model


def _checkpointed(forward: Callable, keep: dict) -> Callable:
    def compute(*args, **kwargs):
        with timing.left_out() if runs_again() else nullcontext():
            return forward(*args, **kwargs)

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():  # evaluation: nothing to save, nothing to set up
            return forward(*args, **kwargs)
        return checkpoint(compute, *args, use_reentrant=False, **keep, **kwargs)

    return run


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    if op.name() in _KEPT_BY_SELECTIVE:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
