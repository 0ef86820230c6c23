"""The learning rate as a pure function of the step.

Nothing to save and nothing to restore: a resumed run asks for the step it is at.

    factor
     1 |   /------\\            constant   stays at 1
       |  /        \\           linear     falls straight to min_lr_ratio at the last step
       | /          \\          cosine     falls along half a cosine to min_lr_ratio
       |/            `--        wsd        stays at 1, then falls straight in the last decay_steps
       +------------------ step
        warmup_steps
"""

import math

import torch

from titan_vlm.config import Schedule


def lr_factor(step: int, config: Schedule, total_steps: float) -> float:
    """What the base learning rate is multiplied by in step `step`, counted from 0.

    The warm-up's first step already learns (1 / warmup_steps), its last one has the full rate, and
    the last of `total_steps` (infinite: not known yet) has `min_lr_ratio`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    start = config.warmup_steps
    if config.kind == "wsd":
        start = max(start, total_steps - config.decay_steps)
    # The step before `start` has the full rate, the last step of the run the lowest.
    done = min(1.0, max(0, step + 1 - start) / max(1, total_steps - start))
    fall = (1 - math.cos(math.pi * done)) / 2 if config.kind == "cosine" else done
    return 1.0 - (1.0 - config.min_lr_ratio) * fall


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, config: Schedule, total_steps: float
) -> dict[str, float]:
    """Give every group its rate for step `step`; returns them by group name without its decay."""
    factor = lr_factor(step, config, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return {group["name"].split("/no_decay")[0]: group["lr"] for group in optimizer.param_groups}
