"""Pipeline parallelism: the layers are split over the ranks of `mesh.pp`, in stages.

A stage is the model without the modules of the other stages. What goes from stage to stage is the
hidden states [B, S, D], and a tensor of the same shape for each DeepStack level whose layer is
still to come: dense, because how many visual tokens a micro-batch has is different every time, and
what is received must have a shape known before.

    stage 0         vision, embedding, layers 0-1         pixels go nowhere else
        |           hidden, DeepStack level 2             [B, S, D] each (with SP: [B, S/tp, D])
    stage 1         layers 2-5
        |           hidden
    stage 2         layers 6-7, norm, head, loss

Everything else of a micro-batch (positions, lengths, labels) every rank reads for itself: the ranks
along `pp` have the same rows. Schedules and transport are torch.distributed.pipelining's; the
gradients of micro-batches are summed, not averaged.

The stages of a rank share their modules with one model that holds just those, under their names in
the whole: what optimizer, checkpoints and metrics see. Called for evaluation, it runs all stages
one behind another and has the result on every rank.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)
from torch.distributed.tensor import DTensor

from titan_vlm.models.inputs import Batch
from titan_vlm.models.layers.head import Head
from titan_vlm.models.moe.placement import LogicalOrder
from titan_vlm.models.units import Unit
from titan_vlm.parallel.schedules import Schedule

# A micro-batch on this rank's device -> what makes its share of the loss of the last hidden states.
LossOf = Callable[[Batch], Head]


def take(module: nn.Module, names: set[str], prefix: str = "") -> nn.Module:
    """A copy of `module` that shares the modules called `names` and has None for the others."""
    part = copy.copy(module)
    for key, value in vars(module).items():
        if isinstance(value, dict):  # hooks, parameters, modules: the copy's own
            vars(part)[key] = copy.copy(value)
    for name, child in module.named_children():
        path = prefix + name
        if path in names:
            continue
        if any(other.startswith(f"{path}.") for other in names) or isinstance(child, nn.ModuleDict):
            part._modules[name] = take(child, names, f"{path}.")
        elif isinstance(module, nn.ModuleDict):
            del part._modules[name]
        else:
            part._modules[name] = None
    return part


def _with_contiguous_gradient(x: Tensor) -> Tensor:
    """What is sent must be contiguous, and a gradient may come out of any layout."""
    x = x.view_as(x)  # the buffer itself is used again and would collect hooks
    if x.requires_grad:
        x.register_hook(Tensor.contiguous)
    return x


class Pipeline:
    """The stages of this rank, and the schedule that runs them."""

    def __init__(
        self,
        model: nn.Module,
        units: list[list[Unit]],
        schedule: Schedule,
        mesh: DeviceMesh,
        device: torch.device,
        shape: Callable[[Batch], tuple[int, ...]],
        dtype: torch.dtype,
    ):
        """Cuts `model`, on the meta device, and keeps the parts of this rank.

        The parts are still to be parallelised and given memory, in place.

        Args:
            units: of each stage.
            mesh: `Mesh.pp`.
            shape: of the hidden states of a micro-batch on this rank, [B, S, D].
            dtype: theirs.
        """
        self.schedule, self.group = schedule, mesh.get_group()
        self.rank = mesh.get_local_rank()
        self.device, self.shape, self.dtype = device, shape, dtype
        self.connected: list[PipelineStage] = []
        self.runner = None  # made of stages that are ready, when they first run
        names = [{name for unit in stage for name in unit.modules} for stage in units]
        # DeepStack levels that each stage is handed; none behind the last.
        self.levels = [stage[0].levels for stage in units] + [0]
        self.all_levels = max(unit.levels for stage in units for unit in stage)
        self.owners = {
            name: schedule.stage_ranks[stage]
            for stage, modules in enumerate(names)
            for name in take(model, modules).state_dict()
        }
        self.shapes = {name: (x.shape, x.dtype) for name, x in model.state_dict().items()}
        mine = [i for i, rank in enumerate(schedule.stage_ranks) if rank == self.rank]
        self.stages = {i: self._stage(take(model, names[i]), i) for i in mine}
        self.model = take(model, set.union(*(names[i] for i in mine)))
        self.model.forward = self.evaluate

    def _stage(self, stage: nn.Module, index: int) -> nn.Module:
        """Let the part of a model take and give what goes from stage to stage."""
        last = len(self.schedule.stage_ranks) - 1
        all_levels = self.all_levels
        arriving, leaving = self.levels[index], self.levels[index + 1]

        def forward(*arrived: Tensor, batch: Batch, loss_of: LossOf):
            where_M = batch.visual_index_M
            if index == 0:
                hidden_BSD, deepstack = stage.enter(batch)
            else:
                hidden_BSD, *dense = map(_with_contiguous_gradient, arrived)
                given = [level.flatten(0, 1).index_select(0, where_M) for level in dense]
                # Levels are counted from the first layer on; the others' are added already.
                deepstack = [None] * (all_levels - arriving) + given
            hidden_BSD = stage.decode(hidden_BSD, deepstack, batch)
            if index == last:
                return stage.leave(hidden_BSD, loss_of(batch))
            length, zeros_BSD = hidden_BSD.shape[1], torch.zeros_like(hidden_BSD)
            places = (where_M // length, where_M % length)
            dense = [zeros_BSD.index_put(places, x) for x in deepstack[all_levels - leaving :]]
            if hidden_BSD._is_view():  # which a schedule that splits the backward cannot detach
                hidden_BSD = hidden_BSD.clone()
            return (hidden_BSD.contiguous(), *dense)

        def to_device(_, arrived: tuple, given: dict) -> tuple[tuple, dict]:
            batch = given["batch"]
            if index > 0:
                batch = replace(batch, pixels_NC=batch.pixels_NC[:0])
            return arrived, given | {"batch": batch.to(self.device)}

        # Micro-batches in flight wait on the host; before anything else looks at one, it moves.
        stage.register_forward_pre_hook(to_device, with_kwargs=True)
        stage.forward = forward
        return stage

    def forward_backward(self, batches: list[Batch], loss_of: LossOf) -> Tensor:
        """The loss of all micro-batches, on the rank of the last stage (0 elsewhere); gradients
        are added to the parameters'."""
        if self.runner is None:
            self.runner = self._make_runner(self.shape(batches[0]))
        total = torch.zeros((), dtype=torch.promote_types(self.dtype, torch.float32))
        total = total.to(self.device)
        count = self.schedule.microbatches
        for start in range(0, len(batches), count):
            for stage in self.connected:
                stage.has_backward = True
                stage.clear_runtime_states()
            losses: list[Tensor] = []
            # Not `step`, which would cut one large batch along its first dimension: micro-batches
            # have different numbers of documents, pictures and patches.
            self.runner._step_microbatches(
                [()] * count,
                [{"batch": b, "loss_of": loss_of} for b in batches[start : start + count]],
                [None] * count,
                losses,
            )
            total = sum((loss.detach() for loss in losses), total)
        return total

    def _make_runner(self, shape: tuple[int, ...]):
        last = len(self.schedule.stage_ranks) - 1

        def handed(stage: int) -> tuple[Tensor, ...]:
            """What arrives at a stage."""
            example = torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)
            return (example,) * (1 + self.levels[stage])

        loss = torch.empty((), device="meta", requires_grad=True)
        self.connected = [
            PipelineStage(
                stage,
                index,
                last + 1,
                self.device,
                input_args=handed(index) if index else (),
                output_args=handed(index + 1) if index < last else loss,
                group=self.group,
            )
            for index, stage in self.stages.items()
        ]
        options = {
            "n_microbatches": self.schedule.microbatches,
            "loss_fn": lambda loss, _: loss,
            "scale_grads": False,  # the loss is divided by the targets of the global batch
        }
        if self.schedule.csv:
            runner = _PipelineScheduleRuntime(self.connected, **options)
            runner._load_csv(str(self.schedule.csv))
            return runner
        kind = get_schedule_class(self.schedule.name)
        single = issubclass(kind, PipelineScheduleSingle)
        return kind(self.connected[0] if single else self.connected, **options)

    # ------------------------------------------------------------------------ without gradients

    @torch.no_grad()
    def evaluate(self, batch: Batch, head: Head) -> Tensor:
        """What `head` makes of the last hidden states, on every rank of the pipeline."""
        ranks, out = self.schedule.stage_ranks, ()
        for index, owner in enumerate(ranks):
            if owner != self.rank:
                continue
            if index and ranks[index - 1] != owner:
                out = self._receive(ranks[index - 1], 1 + self.levels[index], self.shape(batch))
            out = self.stages[index](*out, batch=batch, loss_of=lambda _: head)
            if index + 1 < len(ranks) and ranks[index + 1] != owner:
                for tensor in out:
                    dist.send(tensor.contiguous(), group=self.group, group_dst=ranks[index + 1])
        return self._from_rank(ranks[-1], out if self.rank == ranks[-1] else None)

    def _receive(self, source: int, count: int, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        tensors = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(count)]
        for tensor in tensors:
            dist.recv(tensor, group=self.group, group_src=source)
        return tuple(tensors)

    def _from_rank(self, source: int, tensor: Tensor | None) -> Tensor:
        """A tensor that one rank has, on all of them."""
        form = [None if tensor is None else (tensor.shape, tensor.dtype)]
        dist.broadcast_object_list(form, group=self.group, group_src=source, device=self.device)
        shape, dtype = form[0]
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    def whole_state(self, state: Mapping[str, Tensor]) -> "WholeState":
        """Parameters and saved buffers of all stages, of which `state` has this rank's.

        Experts are in logical order: where they are placed, the rank that has them knows.
        """
        return WholeState(self, LogicalOrder(state))


class WholeState(Mapping):
    """Asked for a parameter, all ranks get it, from the rank whose stage has it. Every rank must
    ask for the same ones in the same order."""

    def __init__(self, pipeline: Pipeline, state: Mapping[str, Tensor]):
        self.pipeline, self.state = pipeline, state

    def __getitem__(self, name: str) -> Tensor:
        pipeline, owner = self.pipeline, self.pipeline.owners[name]
        if owner == pipeline.rank:
            tensor = self.state[name]
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            tensor = tensor.to(pipeline.device)  # parameters may live in host memory
        else:
            shape, dtype = pipeline.shapes[name]
            tensor = torch.empty(shape, dtype=dtype, device=pipeline.device)
        tensor = tensor.detach().contiguous()
        dist.broadcast(tensor, group=pipeline.group, group_src=owner)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.pipeline.owners)

    def __len__(self) -> int:
        return len(self.pipeline.owners)
