"""AdamW: who is trained, at which learning rate, with or without weight decay; and clipping.

Branches (`model.branches()`: vision, projector, text) and fnmatch patterns over parameter names
are the two ways to speak of parameters, for freezing and for learning rates alike. A name that
means nothing is refused, so that no option ever does nothing.
"""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from titan_vlm.config import Optimizer as OptimizerConfig
from titan_vlm.errors import ConfigError


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, whole: nn.Module | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters.

    One group for each learning rate, with and without weight decay. `group["name"]` is "base" or
    the key of `config.branch_lr`, with "/no_decay" behind it where nothing decays;
    `group["initial_lr"]` is the rate that the schedule scales. Where several keys apply, a pattern
    wins over a branch and a later key over an earlier one.

    Args:
        whole: the model whose parameters `config.branch_lr` names, where `model` has only some.

    Raises:
        ConfigError: a name in `config.branch_lr` matches nothing, or nothing that is trained.
    """
    whole = model if whole is None else whole
    here = dict(model.named_parameters())
    lr_key = _learning_rate_keys(whole, config.branch_lr)
    groups: dict[tuple, dict] = {}
    for name, parameter in whole.named_parameters():  # a tied parameter comes once
        if not parameter.requires_grad:
            continue
        key = lr_key.get(name, "base")
        decays = _decays(name, parameter)
        # One fused kernel cannot update DTensors of several meshes: a group for each mesh.
        mine = here.get(name)
        mesh = mine.device_mesh if isinstance(mine, DTensor) else None
        lr = config.branch_lr.get(key, config.lr)
        group = groups.setdefault(
            (key, decays, mesh),
            {
                "name": key if decays else f"{key}/no_decay",
                "params": [],
                "lr": lr,
                "initial_lr": lr,
                "weight_decay": config.weight_decay if decays else 0.0,
            },
        )
        if mine is not None:  # else it is another stage's, and the group may stay empty here
            group["params"].append(mine)
    if unused := set(config.branch_lr) - {key for key, _, _ in groups}:
        raise ConfigError(
            f"optimizer.branch_lr: {min(unused)!r} is the rate of no parameter that is trained "
            "(training.freeze holds them, or other keys go before it); leave it out"
        )
    devices = {p.device.type for group in groups.values() for p in group["params"]}
    fused = devices <= set(_get_fused_kernels_supported_devices())
    return torch.optim.AdamW(
        list(groups.values()), lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=fused
    )


def _decays(name: str, parameter: Tensor) -> bool:
    """Decay shrinks matrices only.

    Biases (those of experts are stacked) and norm scales do not decay, nor does the vision tower's
    table of positions, whose rows stand for places and are not mixed by a product (as in ViT and
    SigLIP training). The token embedding decays, as in Megatron-LM and transformers: where it is
    tied it is the head.
    """
    return parameter.ndim >= 2 and "pos_embed" not in name and not name.endswith("bias")


def _learning_rate_keys(model: nn.Module, branch_lr: dict[str, float]) -> dict[str, str]:
    """The key in `branch_lr` of each parameter that has one."""
    branches = model.branches()
    by_weight = sorted(branch_lr, key=lambda key: key not in branches)  # stable: patterns last
    keys = {
        parameter: key
        for key in by_weight
        for parameter in match_parameters(model, key, "optimizer.branch_lr").values()
    }
    return {name: keys[p] for name, p in model.named_parameters() if p in keys}


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Set `requires_grad` to False for all parameters that a pattern or branch name matches.

    Raises:
        ConfigError: a pattern matches nothing, or nothing would be left to train.
    """
    for pattern in patterns:
        for parameter in match_parameters(model, pattern, "training.freeze").values():
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"training.freeze = {list(patterns)} freezes every parameter; leave one to train"
        )


def match_parameters(model: nn.Module, pattern: str, setting: str) -> dict[str, nn.Parameter]:
    """Parameters of the branch called `pattern`, or else those whose names match it.

    Raises:
        ConfigError: nothing matches; names `setting` and the nearest branch or parameter.
    """
    # With duplicates: a tied parameter answers to each of its names.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    branches = model.branches()
    names = branches.get(pattern) or [name for name in parameters if fnmatchcase(name, pattern)]
    if not names:
        known = [*(name for name in branches if branches[name]), *parameters]
        nearest = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
        raise ConfigError(
            f"{setting}: {pattern!r} matches no branch ({', '.join(branches)}) and no parameter; "
            f"the nearest is {nearest[0]!r}"
        )
    return {name: parameters[name] for name in names}


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float, stages: int = 1) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm` (0: leave them).

    Returns the norm before scaling, as a scalar on the gradients' device: nobody waits for it.

    One all-reduce of one number over all ranks: each adds the squares of its shards, divided by
    the number of ranks that hold the same shard. DTensors of different meshes (experts and the
    rest) could not meet in one operation.

    Args:
        stages: ranks along the pipeline, which hold different parameters.
    """
    by_shards: dict[int, list[Tensor]] = {}
    dtype, device = torch.float32, torch.device("cpu")
    for parameter in parameters:
        dtype, device = parameter.dtype, parameter.device
        if (grad := parameter.grad) is not None:
            shards = 1
            if isinstance(grad, DTensor):
                sizes = zip(grad.device_mesh.shape, grad.placements, strict=True)
                shards = prod(n for n, placement in sizes if not placement.is_replicate())
                grad = grad.to_local()
            by_shards.setdefault(shards, []).append(grad)
    world = dist.get_world_size() if dist.is_initialized() else 1
    squares = [
        nn.utils.get_total_norm(grads).square() * (shards * stages / world)
        for shards, grads in by_shards.items()
    ]
    if not squares:  # a stage of which all is frozen
        squares = [torch.zeros((), dtype=dtype, device=device)]
    total = torch.stack(squares).sum()
    if world > 1:
        dist.all_reduce(total)
    norm = total.sqrt()
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grads in by_shards.values():
            torch._foreach_mul_(grads, factor)
    return norm
