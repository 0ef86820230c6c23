"""The trainer, top to bottom: `torchrun -m titan_vlm.train --config train_configs/X.toml`.

    configure -> mesh -> build the model -> parallelise it -> fill it -> optimizer, data -> resume
    at the border of two stages: the same once more, from the tensors there are (stages.py)
    for each step:  read the step's rows -> forward and backward, micro-batch by micro-batch
                    -> clip -> update -> metrics -> (validate) -> (save)
    save -> export

A run lives in `run.output_dir`; the same command again resumes it from its newest checkpoint.
"""

import logging
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.elastic.multiprocessing.errors import record

from titan_vlm import distributed, events, launched, lock, run_dir
from titan_vlm.assembly import Parts, export, fill
from titan_vlm.config import Config, config_from_args, config_to_toml
from titan_vlm.conflicts import check_new
from titan_vlm.data.ledger import Ledger
from titan_vlm.data.loader import RowLoader, build_loader, merge_states
from titan_vlm.data.rows import collate
from titan_vlm.errors import DataEnded, DataError, NumericsError, UserError
from titan_vlm.evaluation.validate import Validator, build_validators, facts
from titan_vlm.hang import Watch
from titan_vlm.mesh import Mesh, build_mesh, rank, size
from titan_vlm.models.inputs import Batch
from titan_vlm.models.layers.head import Head
from titan_vlm.models.moe.tokens import Moment
from titan_vlm.parallel import placement
from titan_vlm.parallel.pipeline import Pipeline
from titan_vlm.stages import Stage, build, enter, make_stages, next_stage, stage_at, tell
from titan_vlm.training import feature_cache, routing
from titan_vlm.training.by_source import BySource
from titan_vlm.training.checkpoint import Checkpointer
from titan_vlm.training.curriculum import Place, asleep, known_ends, total_steps
from titan_vlm.training.guards import Guard, Signals, have_same_rows, read_signals
from titan_vlm.training.loss import chunked_cross_entropy
from titan_vlm.training.memory import MemoryReport, OutOfMemory
from titan_vlm.training.metrics import MetricsLogger
from titan_vlm.training.optimizer import build_optimizer, clip_grad_norm
from titan_vlm.training.schedule import set_learning_rates
from titan_vlm.training.stop import Stop

logger = logging.getLogger("titan_vlm")
REFUSAL_S = 5.0  # how long other ranks leave to the one whose output is seen


@record  # torchrun shows the traceback of a rank whose output it hides
def main(argv: list[str]) -> int:
    """Exit status: 0 when the run is complete, 2 when the user must change something, 1 when a
    rank did not arrive at a collective or has no memory left, 75 when it was stopped and the same
    command goes on."""
    try:
        config = config_from_args(argv)
        with (
            run_dir.told(),
            Stop(config.training.max_hours) as stop,
            Watch(config.comm.timeout_s, Path(config.run.output_dir) / "flight_recorder") as watch,
            MemoryReport(config) as memory,
        ):
            train(config, watch, stop, memory)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if distributed.is_hidden_rank():  # torchrun ends all with the first, so let the seen one be
            time.sleep(REFUSAL_S)
        return 2
    except OutOfMemory:
        if distributed.is_hidden_rank():  # then torchrun shows what is raised
            raise
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return launched.end(stopped=bool(stop.reason))


def train(config: Config, watch: Watch, stop: Stop, memory: MemoryReport) -> None:
    """Train as `config` says, from wherever `run.output_dir` left off."""
    run = memory.run = prepare(config)
    steps = total_steps(config)
    metrics = MetricsLogger(
        run.output,
        config.metrics,
        steps or 0,
        run.device,
        start_step=run.step,
        ends=known_ends(config),
        world_size=dist.get_world_size(),
        silent=dist.get_rank() != 0,
        pp_ranks=size(run.mesh.pp),
        branches={name: layer.branch for name, layer in run.moe_layers.items()},
    )
    if run.is_finished:
        logger.info("this run is finished: step %d of %d", run.step, steps or run.step)
    try:
        train_steps(run, metrics, watch, stop)
    except (DataError, NumericsError):  # of all ranks; what is being written becomes a checkpoint
        run.checkpointer.settle()
        raise
    # In a row of bad steps the last checkpoint is as far as a run that stops has come.
    if run.step and not (stop.reason and run.guard.state.streak):
        for _ in range(2):  # again where the storage failed; else a step is not saved twice
            save(run)
            run.checkpointer.wait()
    run.checkpointer.close()
    run.loader.close()
    if run.ledger:
        run.ledger.close()
    metrics.close()
    if stop.reason:
        logger.info("stopped after step %d (%s); the same command goes on", run.step, stop.reason)
    else:
        export_hf(run)
    events.write("stop", step=run.step, **stop.outcome())


def train_steps(run: "Run", metrics: MetricsLogger, watch: Watch, stop: Stop) -> None:
    """Until the last step, or the one after which the ranks have agreed to stop."""
    config = run.config
    while not run.is_finished and not stop.agreed(run.step):
        watch.step = run.step + 1
        if run.stage_is_over:  # a checkpoint of this step is of the stage that ends
            with metrics.pause():
                next_stage(run)
        try:
            train_step(run, metrics)
        except DataEnded:  # on every rank, before anything was changed
            if not run.guard.state.streak:
                save(run)
            raise
        if run.guard.gives_up:
            roll_back(run)
            metrics.restart(run.step)
            continue
        validator, last = run.validators[run.stage.name], run.stage_is_over
        if validator and (last or (due(run.step, config.eval.every) and not stop.agreed(run.step))):
            with metrics.pause():
                result = validator.run(run.model, run.device)
            result.report(run.step, metrics, run.config.eval.show)
        if run.guard.may_save(run.step, due(run.step, config.checkpoint.every)):
            with metrics.pause():
                save(run, must=False)


def prepare(config: Config) -> "Run":
    """Everything that a step needs, new or as the newest checkpoint has it."""
    stages = make_stages(config, distributed.world_size())
    if config.checkpoint.export_hf:
        stages[-1].parts.spec.check_exportable(stages[-1].parts.dims)
    plan = stages[0].plan
    device = distributed.start(config.run.device, config.comm)
    mesh = build_mesh(device.type, plan.degrees, config.parallelism.expert_parallel_over_tp)
    output = Path(config.run.output_dir)
    run_dir.open_run_dir(output, plan.degrees)
    for group in mesh.across_nodes(distributed.processes_per_node()):
        logger.info("the group %s crosses nodes: each of its exchanges takes the network", group)

    checkpointer = Checkpointer(
        config.checkpoint.directory or output / "checkpoints",
        config.checkpoint,
        config.guards.max_failed_saves,
        about={"mesh": plan.degrees, "config": config_to_toml(config)},
        tell=events.write,
    )
    if checkpointer.storage.is_local:  # other runs may use it from another run.output_dir
        lock.take(Path(checkpointer.storage.root), "checkpoint.directory")
    resume_from = checkpointer.history.find()
    stage = stage_at(stages, checkpointer, resume_from)
    # Before the model, which may take minutes: mistakes in [data] are the most frequent.
    reader, readers = mesh.batch.get_local_rank(), mesh.batch.size()
    parts = stage.parts
    with distributed.together():
        if resume_from is None:
            check_new(config)
        loader = build_loader(stage.config, parts.tokenizer, parts.images, reader, readers)
        validators = build_validators(stages)
    distributed.check_alike(loader.rows.sequence | facts(validators))
    model, pipeline, whole = build(stage, mesh, device)
    fill(model, parts, config, device, fresh=resume_from is None)
    optimizer = build_optimizer(model, stage.config.optimizer, whole)
    run = Run(
        stages,
        stage,
        output,
        checkpointer,
        model,
        optimizer,
        loader,
        device,
        mesh,
        pipeline,
        routing.all_layers(whole),
        BySource(loader.rows.mixture, device),
        Guard(config.guards, events.write),
        validators,
    )
    run.place = Place(stage.name, asleep=asleep(stage.config))
    resume(run, resume_from)
    if resume_from is None:
        tell(run)
    place_experts(run)
    feature_cache.apply(model, stage.config, mesh)
    # Last, for a run that is refused must not change the one it met.
    checkpointer.history.go_back()
    if resume_from is None:
        run_dir.begin_anew(output, checkpointer.ranks, checkpointer.storage.root)
    open_ledger(run)
    run_dir.describe(output, config, plan.degrees)
    launched.set_up()
    return run


@dataclass
class Run:
    """What a step works on."""

    stages: list[Stage]
    stage: Stage  # that the run is in, and what all below are of
    output: Path
    checkpointer: Checkpointer
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: RowLoader
    device: torch.device
    mesh: Mesh
    pipeline: Pipeline | None  # then `model` has this rank's stages
    moe_layers: routing.Layers
    sources: BySource
    guard: Guard
    validators: dict[str, Validator | None]  # by stage; where there are held-out data
    ledger: Ledger | None = None
    step: int = 0
    place: Place = field(default_factory=Place)
    # Samples left out since the run began, by reason.
    skipped: dict[str, int] = field(default_factory=lambda: {"bad": 0, "dropped": 0, "cut": 0})

    @property
    def config(self) -> Config:
        return self.stage.config

    @property
    def parts(self) -> Parts:
        return self.stage.parts

    @property
    def stage_is_over(self) -> bool:
        return self.place.is_over(self.step, self.stage.length)

    @property
    def is_finished(self) -> bool:
        return self.stage_is_over and self.stage is self.stages[-1]


# ---------------------------------------------------------------------------- one step


def train_step(run: Run, metrics: MetricsLogger) -> None:
    """One update from `training.global_batch_size` rows, or none where the step goes wrong."""
    config = run.config.training
    step, steps = run.place.schedule(run.step, run.stage.length)
    rates = set_learning_rates(run.optimizer, step, run.config.schedule, steps)

    with metrics.waiting_for_data():
        count = config.global_batch_size // run.mesh.batch.size()
        rows, error = run.guard.try_to_take(run.loader, count)
        alike = have_same_rows(rows, run.mesh)
    micro = config.micro_batch_size
    moment = Moment(
        run.config.run.seed,
        run.step,
        micro_batches=len(rows) // micro,
        observe=metrics.due(run.step + 1),
    )
    batches = [
        collate(rows[i * micro : (i + 1) * micro], replace(moment, micro_batch=i))
        for i in range(moment.micro_batches)
    ]
    counts = global_counts(run, batches, error, alike)

    counted = routing.counted(run.model)
    loss = forward_backward(run, batches, counts["targets"])
    norm = clip_grad_norm(run.model.parameters(), config.max_norm, size(run.mesh.pp))
    broken_L = routing.broken(run.model, run.moe_layers, run.device)
    signals = read_signals(loss, norm, broken_L, run.moe_layers, run.mesh)
    run.step += 1
    run.place.count(counts)
    good = run.guard.judge(run.step, signals, rows)
    if good:
        routing.steer(run.model, run.mesh)
        run.optimizer.step()
    else:
        routing.forget(run.model, counted)
    run.optimizer.zero_grad()
    if good and due(run.step, run.config.parallelism.eplb_interval):
        loads = routing.loads_to_place(run.model, run.mesh)
        placement.rebalance(run.model, run.optimizer, run.mesh, loads)
    if run.ledger:
        run.ledger.write(run.step, rows)
    report_step(run, metrics, counts, signals, rates, good)


def global_counts(
    run: Run, batches: list[Batch], error: Exception | None, alike: bool
) -> dict[str, float]:
    """What the global batch holds, summed over the ranks on the host; updates `run.skipped` and
    `run.sources`.

    Raises:
        DataError: on all ranks, where any of them has an `error` of reading, where ranks that share
            rows have not read them `alike`, or too many are bad.
    """
    spec, dims = run.parts.spec, run.parts.dims
    counts = {
        "targets": sum(int(b.num_targets) for b in batches),
        "tokens": sum(b.num_tokens for b in batches),
        "positions": sum(b.tokens_BS.numel() for b in batches),
        "samples": sum(b.num_samples for b in batches),
        "images": sum(b.num_images for b in batches),
        "flops": sum(spec.flops(dims, b.sample_lens, b.grids) for b in batches),
    }
    so_far = [x for source in run.loader.counts_of for x in source.as_list()]
    more = run.loader.ended < sum(len(b.tokens_BS) for b in batches)
    stuck = error is not None or not alike
    values = torch.tensor([*counts.values(), more, stuck, *so_far], dtype=torch.float64)
    values = distributed.sum_over(run.mesh.batch, values).tolist()
    if values[len(counts) + 1]:
        distributed.tell_all(error)
        raise DataError(
            f"step {run.step + 1}: ranks along parallelism.tp and pp have read different rows, for "
            "something could be read by some of them alone (skipped samples in logs/rank*.log); "
            "mend that, the same command goes on from the newest checkpoint"
        )
    run.sources.set_counts(run.step + 1, values[len(counts) + 2 :])
    run.skipped = {name: getattr(run.sources.total, name) for name in run.skipped}
    run.sources.check_bad(run.config.data.max_bad_fraction, run.loader.reasons)
    if not values[len(counts)]:
        raise run.loader.rows.mixture.ended(run.step)
    return dict(zip(counts, values, strict=False))


def forward_backward(run: Run, batches: list[Batch], targets: float) -> Tensor:
    """This rank's share of the loss; gradients are added to the parameters'.

    The loss is the mean over the `targets` of the whole global batch. Every rank and micro-batch
    divides its own sum by their number, and gradients are summed, never averaged.
    """

    def loss_of(batch: Batch) -> Head:
        chunk = run.config.training.loss_chunk_tokens
        return lambda hidden_BSD, weight_VD: (
            chunked_cross_entropy(
                hidden_BSD, weight_VD, batch.labels_BS, chunk, run.sources.tally(batch)
            )
            / max(targets, 1)
        )

    if run.pipeline:
        return run.pipeline.forward_backward(batches, loss_of)
    total = torch.zeros((), device=run.device)
    for batch in batches:
        batch = batch.to(run.device)
        loss = run.model(batch, loss_of(batch))
        loss.backward()
        total = total + loss.detach()
    return total


def report_step(
    run: Run,
    metrics: MetricsLogger,
    counts: dict[str, float],
    signals: Signals,
    rates: dict[str, float],
    good: bool,
) -> None:
    """Hand the step's figures to the metrics; a step that is not `good` has none of experts."""
    metrics.count(**{name: value for name, value in counts.items() if name != "targets"})
    figures, sources = {}, {}
    if metrics.due(run.step):
        sources = run.sources.figures(run.mesh)
    if good and metrics.due(run.step):
        figures = routing.collect(run.model, run.moe_layers, run.mesh, run.device)
    metrics.end_step(
        run.step,
        loss=signals.loss,
        grad_norm=signals.norm,
        learning_rates=rates,
        expert_loads={name: layer.load_E for name, layer in figures.items()},
        routing={
            name: layer.summary(run.moe_layers[name].config, run.step - 1)
            for name, layer in figures.items()
        },
        timings={name: layer.timing() for name, layer in figures.items()},
        skipped=run.skipped,
        sources=sources,
        guards=run.guard.counts(),
    )


# ---------------------------------------------------------------------------- save, resume, export


def save(run: Run, must: bool = True) -> None:
    """Write a checkpoint of this step; unless it `must` be, not while another is being written."""
    if run.ledger:
        run.ledger.sync()
    counters = {name: counter.cpu() for name, counter in routing.counters(run.model).items()}
    state = {"loader": run.loader.state_dict(), "routing": counters}
    state |= {"guard": run.guard.state_dict(), "stage": run.place.state_dict()}
    run.checkpointer.save(run.step, run.model, run.optimizer, state, must)


def resume(run: Run, step: int | None) -> None:
    """Continue from the checkpoint of a step, whatever mesh has written it."""
    if step is None:
        return
    if any(name.endswith("slots_E") for name in run.checkpointer.saved(step)):
        placement.register(run.model)  # experts have moved
    ranks = run.checkpointer.load(step, run.model, run.optimizer)
    merged = merge_states([rank["loader"] for rank in ranks])
    run.sources.counts = run.loader.load_state_dict(merged)
    if run.mesh.tokens.get_local_rank() == 0:  # the counters of all are summed when reported
        for rank in ranks:
            routing.add_counters(run.model, rank["routing"])
    run.guard.load_state_dict(ranks[0].get("guard"))
    run.step, run.place = step, Place(**ranks[0].get("stage", {}))
    events.write("resume", step=step, mesh=dict(run.mesh.degrees), ranks_saved=len(ranks))
    logger.info("resumed at step %d", step)


def roll_back(run: Run) -> None:
    """Make everything as of the newest checkpoint, but for the rows of the bad steps."""
    before, checkpoint = run.guard.state, run.checkpointer.newest()
    run.guard.check_rollback(checkpoint)
    routing.forget(run.model)
    if (stage := stage_at(run.stages, run.checkpointer, checkpoint)) is not run.stage:
        enter(run, stage)
    resume(run, checkpoint)
    place_experts(run)
    feature_cache.apply(run.model, run.config, run.mesh)
    run.guard.rolled_back(before, checkpoint)
    open_ledger(run)


def open_ledger(run: Run) -> None:
    """Go on with the ledger behind the step that the run is at."""
    if run.ledger:
        run.ledger.close()
    mesh = run.mesh
    # One of those that read the same rows.
    if run.config.data.ledger and rank(mesh.pp) == rank(mesh.tp) == 0:
        reader, readers = mesh.batch.get_local_rank(), mesh.batch.size()
        run.ledger = Ledger(run.output, reader, readers, run.step)


def place_experts(run: Run) -> None:
    """Bring the experts to the ranks that `parallelism.expert_placement` names, from wherever the
    initial weights or a checkpoint have them."""
    kind = run.config.parallelism.expert_placement
    if kind != "linear":
        placement.register(run.model)
    if kind != "balanced":
        placement.arrange(run.model, run.optimizer, run.mesh, kind)


def export_hf(run: Run) -> None:
    """Leave a Hugging Face directory beside the finished run, if `[checkpoint]` asks for one."""
    config = run.config.checkpoint
    if not config.export_hf:
        return
    directory = run.output / "hf"
    state = get_model_state_dict(run.model)
    export(
        run.parts,
        run.pipeline.whole_state(state) if run.pipeline else state,
        directory,
        config.export_dtype,
        layout=None if config.export_layout == "auto" else config.export_layout,
        write=dist.get_rank() == 0,
    )
    logger.info("exported to %s", directory)


def due(step: int, every: int) -> bool:
    """Whether something done every n steps (0: never) is done after step `step`."""
    return every > 0 and step % every == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
