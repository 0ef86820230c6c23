"""Quantised experts: hand every `Experts` the product of `[quantize]`; nothing else is touched.

Weights stay what they are (float32 masters, gathered in bfloat16), and are rounded where they are
multiplied: sharding, expert parallelism, checkpoints and export know nothing of it.
"""

from torch import nn

from titan_vlm.config import Quantize
from titan_vlm.errors import ConfigError
from titan_vlm.mesh import Mesh
from titan_vlm.models.moe.dispatcher import LocalDispatcher
from titan_vlm.models.moe.layer import moe_layers
from titan_vlm.models.moe.quantize import RECIPES, by_torchao, emulated


def check(whole: nn.Module, config: Quantize) -> None:
    """Whether the experts of `whole`, the model before it is split, can be quantised as configured.

    Raises:
        ConfigError: it has none, or widths that the recipe cannot divide into its blocks.
    """
    if config.experts == "none":
        return
    layers = moe_layers(whole)
    if not layers:
        raise ConfigError(
            f'quantize.experts = "{config.experts}": this model has no experts; use "none"'
        )
    recipe = RECIPES[config.experts]
    multiple = (recipe.block or 1) if config.emulate else recipe.widths
    for name, layer in layers.items():
        experts = layer.experts
        widths = {*experts.first.shape[1:], *experts.down.shape[1:]}
        if unfit := sorted(width for width in widths if width % multiple):
            raise ConfigError(
                f'quantize.experts = "{config.experts}": expected widths that are multiples of '
                f"{multiple}, the experts of {name} have {', '.join(map(str, unfit))}; "
                f'use "none" or other widths'
            )


def apply(model: nn.Module, mesh: Mesh, config: Quantize) -> nn.Module:
    """Set the product of every `Experts` in `model`; returns `model`.

    Comes after expert parallelism, which chooses the dispatchers.

    Raises:
        ConfigError: hardware or torchao cannot do it.
    """
    if config.experts == "none":
        return model
    if config.emulate:
        product = emulated(config.experts)
    else:
        product = by_torchao(config.experts, mesh.root.device_type)
    for name, layer in moe_layers(model).items():
        layer.experts.matmul = product
        local = getattr(layer.dispatcher, "local", layer.dispatcher)
        if isinstance(local, LocalDispatcher):
            local.align = RECIPES[config.experts].rows
        elif not config.emulate:
            raise ConfigError(
                f'quantize.experts = "{config.experts}": the dispatcher of {name}, '
                f'"{layer.router.config.dispatcher}", aligns groups its own way; use '
                '"all_to_all", or quantize.experts = "none"'
            )
    return model
