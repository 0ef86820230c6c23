"""The stages of a run, as far as they need torch: all made ready before the first step, and one
entered from the one before.

    stage before            stage                     on the same mesh, in the same processes
    parameters, buffers --> the same, by name         no tensor is copied
    optimizer state     --> of what goes on training  what is thawed has none yet
    expert 0            --> copied to the others      where a layer's experts wake
    samples             --> go on where they were     those in windows are encoded again

Everything else is built anew as the stage's configuration says: routers, FSDP units, compiled
blocks, the shapes of a pipeline, the optimizer's groups.
"""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from titan_vlm import events
from titan_vlm.assembly import Parts, assemble, build_model
from titan_vlm.config import Config
from titan_vlm.data.loader import build_loader
from titan_vlm.errors import ConfigError
from titan_vlm.mesh import Mesh
from titan_vlm.models.moe.layer import moe_layers
from titan_vlm.parallel import placement
from titan_vlm.parallel.pipeline import Pipeline
from titan_vlm.parallelize import Plan, make_plan, parallelize
from titan_vlm.training import feature_cache, routing
from titan_vlm.training.checkpoint import Checkpointer
from titan_vlm.training.curriculum import Length, Place, asleep, check_still_awake, stage_configs
from titan_vlm.training.optimizer import build_optimizer, freeze_parameters

logger = logging.getLogger("titan_vlm")


@dataclass(frozen=True)
class Stage:
    """A stage made ready. A run without a curriculum has one, without a name."""

    name: str
    length: Length
    config: Config
    parts: Parts
    plan: Plan


def make_stages(config: Config, world: int) -> list[Stage]:
    """The stages of a run on `world` processes. Each is assembled, planned and built on the meta
    device: what a later one would be refused for is said now.

    Raises:
        ConfigError: names the stage and the key.
    """
    stages: list[Stage] = []
    shapes: dict[str, torch.Size] = {}
    can_cache = False
    for number, (name, length, own) in enumerate(stage_configs(config)):
        try:
            parts = assemble(own, stages[0].parts.tokenizer if stages else None)
            stage = Stage(name, length, own, parts, make_plan(own, parts, world))
            if name or own.data.feature_cache:
                whole = build_whole(stage)
                build_optimizer(whole, own.optimizer)
                shapes = shapes or _shapes(whole)
                _check_shapes(_shapes(whole), shapes)
                can_cache |= bool(own.data.feature_cache) and feature_cache.check(whole, own)
        except ConfigError as error:
            if not name:
                raise
            raise ConfigError(f'curriculum.stages[{number}] ("{name}"): {error}') from error
        stages.append(stage)
    if config.data.feature_cache and not can_cache:
        raise ConfigError(
            f'data.feature_cache = "{config.data.feature_cache}": the vision tower trains; set '
            'training.freeze = ["vision"], or leave it out'
        )
    return _with_one_split(stages)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.shape for name, tensor in tensors}


def _check_shapes(own: dict[str, torch.Size], first: dict[str, torch.Size]) -> None:
    for name in [*own, *first]:
        if own.get(name) != first.get(name):
            have = [str(list(of[name])) if name in of else "none" for of in (own, first)]
            raise ConfigError(f"{name}: {have[0]}, but {have[1]} in the first stage")


def _with_one_split(stages: list[Stage]) -> list[Stage]:
    """A pipeline is cut as the most expensive stage of the curriculum wants it, for layers cannot
    change their ranks at a border."""
    units = [[unit for part in stage.plan.stages for unit in part] for stage in stages]
    costs = [sum(unit.cost for unit in own) for own in units]
    sizes = [len(part) for part in stages[costs.index(max(costs))].plan.stages]
    ends = list(accumulate(sizes, initial=0))
    return [
        replace(stage, plan=replace(stage.plan, stages=[own[a:b] for a, b in pairwise(ends)]))
        for stage, own in zip(stages, units, strict=True)
    ]


def stage_at(stages: Sequence[Stage], checkpointer: Checkpointer, step: int | None) -> Stage:
    """The stage that the checkpoint of a step is in; without one the first.

    Raises:
        ConfigError: there is none of its name, or it is no longer as it was.
    """
    if step is None:
        return stages[0]
    place = Place(**checkpointer.read(step)[0].get("stage", {}))
    name = place.stage
    for stage in stages:
        if stage.name == name:
            check_still_awake(place, stage.config)
            return stage
    was = f'of the stage "{name}"' if name else "of a run without [[curriculum.stages]]"
    now = ", ".join(f'"{stage.name}"' for stage in stages if stage.name) or "none"
    raise ConfigError(
        f"curriculum.stages: the checkpoint of step {step} is {was}, and the stages now are {now}; "
        "name them as they were, or use another run.output_dir"
    )


def build_whole(stage: Stage) -> nn.Module:
    """The whole model on the meta device, frozen as the stage says."""
    whole = build_model(stage.parts, stage.config)
    freeze_parameters(whole, stage.config.training.freeze)
    return whole


def build(
    stage: Stage, mesh: Mesh, device: torch.device
) -> tuple[nn.Module, Pipeline | None, nn.Module]:
    """This rank's part of the stage's model, which still has no memory; the pipeline that runs it
    where there is one; and the whole model, of which names are asked."""
    whole = build_whole(stage)
    width = stage.parts.dims.text.hidden_size
    model, pipeline = parallelize(whole, stage.plan, mesh, stage.config, width, device)
    return model, pipeline, whole


# ---------------------------------------------------------------------------- over a border


def next_stage(run: Any) -> None:
    """Let `run` (of train.py) go on in the stage that follows. Every rank calls it, between two
    steps; a checkpoint of the step before is of the stage that ends."""
    enter(run, run.stages[run.stages.index(run.stage) + 1])
    run.place = Place(run.stage.name, began=run.step, asleep=asleep(run.config))
    run.guard.begin_stage()
    feature_cache.apply(run.model, run.config, run.mesh)
    routing.forget(run.model)  # reports are of one stage alone
    tell(run)


def tell(run: Any) -> None:
    """Log the stage that begins."""
    if name := run.stage.name:
        number = run.stages.index(run.stage) + 1
        events.write("stage", step=run.step, stage=name, number=number)
        logger.info("stage %d, %s, begins after step %d", number, name, run.step)


def enter(run: Any, stage: Stage) -> None:
    """Build anew what depends on the stage, with the tensors and samples of the one before."""
    if stage.config.compile.enable:
        torch._dynamo.reset()  # graphs of the model that goes
    model, pipeline, whole = build(stage, run.mesh, run.device)
    _reshard(run)
    take_over(model, run.model)
    optimizer = build_optimizer(model, stage.config.optimizer, whole)
    take_over_state(optimizer, run.optimizer)
    layers = routing.all_layers(whole)
    woken = [n for n, layer in layers.items() if run.moe_layers[n].asleep and not layer.asleep]
    placement.copy_first_expert(model, optimizer, run.mesh, woken)
    loader = build_loader(
        stage.config,
        stage.parts.tokenizer,
        stage.parts.images,
        run.loader.rows.rank,
        run.loader.rows.ranks,
        opened=run.loader.rows.mixture,
    )
    loader.go_on_from(run.loader)
    run.stage, run.loader, run.moe_layers = stage, loader, layers
    run.sources.members = loader.rows.mixture.members
    run.model, run.pipeline, run.optimizer = model, pipeline, optimizer
    gc.collect()  # hooks of the model that goes refer to each other


def _reshard(run: Any) -> None:
    """A validation leaves roots gathered. Those of a pipeline are its stages, not `run.model`."""
    stages = run.pipeline.stages.values() if run.pipeline else ()
    for root in (run.model, *stages):
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def take_over(model: nn.Module, before: nn.Module) -> None:
    """Give `model`, built alike on the meta device, the parameters and buffers of `before`."""
    if any(layer.slots_E is not None for layer in moe_layers(before).values()):
        placement.register(model)
    there = dict(before.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        old = there[name]
        for key, parameter in module._parameters.items():
            if parameter is not None:
                taken = old._parameters[key]
                assert taken.shape == parameter.shape, f"{name}.{key} of two shapes"
                module._parameters[key] = taken.requires_grad_(parameter.requires_grad)
        for key in module._buffers:
            module._buffers[key] = old._buffers[key]


def take_over_state(optimizer: torch.optim.Optimizer, before: torch.optim.Optimizer) -> None:
    """Keep what is known of parameters that go on training; that of others is dropped."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in before.state:
                optimizer.state[parameter] = before.state[parameter]
