"""From the degrees of `[parallelism]` to a parallel model: refuse first, then apply.

make_plan      before any process group or model exists: everything that can be refused
parallelize    the techniques, each a file of parallel/, in their order
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from titan_vlm.assembly import Parts
from titan_vlm.config import Config
from titan_vlm.errors import ConfigError
from titan_vlm.mesh import Mesh, check_divides, resolve_degrees, size
from titan_vlm.models.inputs import Batch
from titan_vlm.models.units import Unit
from titan_vlm.parallel import activation_checkpoint, compile, expert, fsdp, quantize, tensor
from titan_vlm.parallel.pipeline import Pipeline
from titan_vlm.parallel.schedules import Schedule, resolve_schedule, split_stages
from titan_vlm.parallel.support import refuse_combinations

logger = logging.getLogger("titan_vlm")


@dataclass(frozen=True)
class Plan:
    """The degree of each axis, and with a pipeline its schedule and the units of each stage."""

    degrees: Mapping[str, int]
    schedule: Schedule | None
    stages: list[list[Unit]]


def make_plan(config: Config, parts: Parts, world: int) -> Plan:
    """What `world` processes are to do.

    Raises:
        ConfigError: degrees that the world, the model or the batch cannot be split by, or settings
            that do not go together; with the sum and the nearest choices that work.
    """
    degrees = resolve_degrees(config.parallelism, world)
    over_tp = config.parallelism.expert_parallel_over_tp
    views = {"tp": degrees["tp"], "expert": degrees["ep"] * (degrees["tp"] if over_tp else 1)}
    check_divides(views, parts.spec.divisible(parts.dims))
    microbatches = count_microbatches(config, degrees)
    schedule = resolve_schedule(config.parallelism, microbatches)
    refuse_combinations(config, degrees, schedule, parts.dims)
    if schedule is None:
        return Plan(degrees, None, [])
    units = parts.spec.pipeline_units(parts.dims, config.training.seq_len)
    return Plan(degrees, schedule, split_stages(units, schedule, config.parallelism.pp_split))


def count_microbatches(config: Config, degrees: Mapping[str, int]) -> int:
    """Micro-batches of one rank in one step.

    Raises:
        ConfigError: the ranks do not divide the batch.
    """
    ranks = prod(degrees[axis] for axis in ("dp_replicate", "dp_shard", "ep"))
    rows, unit = config.training.global_batch_size, ranks * config.training.micro_batch_size
    if rows % unit == 0:
        return rows // unit
    below, above = rows // unit * unit, (rows // unit + 1) * unit
    nearest = f"{below} or {above}" if below else str(above)
    micro, each = config.training.micro_batch_size, rows // ranks
    if rows % ranks == 0:
        fits = max(n for n in range(1, each + 1) if each % n == 0 and n <= micro)
        nearest += f", or training.micro_batch_size = {fits}"
    raise ConfigError(
        f"training.global_batch_size = {rows} is no multiple of {ranks} data-parallel ranks x "
        f"training.micro_batch_size {micro} = {unit}; use {nearest}"
    )


def parallelize(
    whole: nn.Module, plan: Plan, mesh: Mesh, config: Config, width: int, device: torch.device
) -> tuple[nn.Module, Pipeline | None]:
    """This rank's part of `whole`, a model on the meta device; it still has no memory.

    Args:
        width: of the hidden states.

    Returns:
        The model, and the pipeline that runs it where there is one.
    """
    quantize.check(whole, config.quantize)
    if plan.schedule is None:
        return apply_techniques(whole, mesh, config), None
    sequence_ranks = size(mesh.tp) if config.parallelism.sequence_parallel else 1

    def hidden_shape(batch: Batch) -> tuple[int, ...]:
        rows, length = batch.tokens_BS.shape
        return rows, -(-length // sequence_ranks), width

    dtype = getattr(torch, config.training.dtype)
    pipeline = Pipeline(whole, plan.stages, plan.schedule, mesh.pp, device, hidden_shape, dtype)
    for stage in pipeline.stages.values():
        apply_techniques(stage, mesh, config)
    total = sum(unit.cost for stage in plan.stages for unit in stage)
    for index, stage in enumerate(plan.stages):
        logger.info(
            "stage %d on pp rank %d: %s to %s, %.0f %% of the cost",
            index,
            plan.schedule.stage_ranks[index],
            stage[0].modules[0],
            stage[-1].modules[-1],
            100 * sum(unit.cost for unit in stage) / total,
        )
    return pipeline.model, pipeline


def apply_techniques(model: nn.Module, mesh: Mesh, config: Config) -> nn.Module:
    """Each technique takes the model and returns it, from the inside of a block outwards."""
    model = tensor.apply(model, mesh, config.parallelism)
    model = expert.apply(model, mesh)
    model = quantize.apply(model, mesh, config.quantize)
    model = compile.apply(model, config.compile)
    model = activation_checkpoint.apply(model, config.activation_checkpoint)
    return fsdp.apply(model, mesh, config)
