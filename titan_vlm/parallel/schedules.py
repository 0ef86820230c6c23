"""Pipeline schedules: which there are, what each asks for, and where each puts the stages.

    schedule                stages per rank   backward   micro-batches n
    GPipe                   1                 whole      any
    1F1B                    1                 whole      at least the stages
    Interleaved1F1B         2 or more         whole      a multiple of the rounds, n // pp
    InterleavedZeroBubble   2 or more         split      a multiple of the rounds, n // pp
    ZBVZeroBubble           2, in a V         split      any
    DualPipeV               2, in a V         split      at least the stages
    a .csv file             as it says        as it says as it says

`whole` gives the gradients of inputs and of weights in one pass; `split` in two, so that those of
the weights can fill what would be the pipeline's bubbles. Two stages on each of two ranks:

    interleaved   rank 0: stages 0, 2   rank 1: stages 1, 3
    in a V        rank 0: stages 0, 3   rank 1: stages 1, 2

Everything here is known before a process group or a model exists.
"""

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from titan_vlm.config import Parallelism
from titan_vlm.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """What a schedule asks for."""

    stages_per_rank: int | None  # None: two or more
    splits_backward: bool
    in_a_v: bool
    # (micro-batches, ranks, stages) -> whether the schedule can run them
    takes: Callable[[int, int, int], bool]
    asks: str


def _any(n: int, ranks: int, stages: int) -> bool:
    return True


def _enough(n: int, ranks: int, stages: int) -> bool:
    return n >= stages


def _even_rounds(n: int, ranks: int, stages: int) -> bool:
    return n % max(1, n // ranks) == 0


KINDS = {
    "GPipe": Kind(1, False, False, _any, "any number"),
    "1F1B": Kind(1, False, False, _enough, "at least as many as stages"),
    "Interleaved1F1B": Kind(None, False, False, _even_rounds, "a multiple of n // pp"),
    "InterleavedZeroBubble": Kind(None, True, False, _even_rounds, "a multiple of n // pp"),
    "ZBVZeroBubble": Kind(2, True, True, _any, "any number"),
    "DualPipeV": Kind(2, True, True, _enough, "at least as many as stages"),
}


@dataclass(frozen=True)
class Schedule:
    """A schedule made concrete.

    stage_ranks   the rank along `pp` of each stage
    microbatches  in one run of it
    csv           the file it comes from, else None
    """

    name: str
    stage_ranks: tuple[int, ...]
    microbatches: int
    splits_backward: bool
    csv: Path | None = None


def resolve_schedule(config: Parallelism, microbatches: int) -> Schedule | None:
    """The schedule that `[parallelism]` asks for; None without a pipeline.

    Args:
        microbatches: of one rank in one step.

    Raises:
        ConfigError: it cannot run; says what would.
    """
    if config.pp == 1:
        _refuse_without_pipeline(config)
        return None
    in_flight = config.pp_microbatches or microbatches
    if microbatches % in_flight:
        good = [n for n in range(1, microbatches + 1) if microbatches % n == 0]
        raise ConfigError(
            f"parallelism.pp_microbatches = {in_flight} does not divide the {microbatches} "
            f"micro-batches of a step; use one of {', '.join(map(str, good))}"
        )
    if config.pp_schedule.endswith(".csv"):
        return _from_csv(config, in_flight)
    if config.pp_schedule not in KINDS:
        raise ConfigError(
            f'parallelism.pp_schedule = "{config.pp_schedule}": expected one of '
            f"{', '.join(KINDS)}, or a .csv file"
        )
    kind = KINDS[config.pp_schedule]
    per_rank = _stages_per_rank(config, kind)
    stages = config.pp * per_rank
    if not kind.takes(in_flight, config.pp, stages):
        good = [
            str(n)
            for n in range(1, microbatches + 1)
            if microbatches % n == 0 and kind.takes(n, config.pp, stages)
        ]
        instead = (
            f"parallelism.pp_microbatches = {' or '.join(good)}"
            if good
            else (
                "more micro-batches (a larger training.global_batch_size, or a smaller "
                "training.micro_batch_size)"
            )
        )
        raise ConfigError(
            f"{config.pp_schedule} over {stages} stages takes {kind.asks}, not {in_flight} "
            f"micro-batches; use {instead}"
        )
    loop = tuple(range(config.pp))
    ranks = loop + loop[::-1] if kind.in_a_v else loop * per_rank
    return Schedule(config.pp_schedule, ranks, in_flight, kind.splits_backward)


def _stages_per_rank(config: Parallelism, kind: Kind) -> int:
    given, fixed = config.pp_stages_per_rank, kind.stages_per_rank
    if given and (given != fixed if fixed else given < 2):
        raise ConfigError(
            f"parallelism.pp_stages_per_rank = {given}: {config.pp_schedule} has "
            f"{fixed or '2 or more'} stages on each rank; use {fixed or 2}"
        )
    return given or fixed or 2


def _refuse_without_pipeline(config: Parallelism) -> None:
    for key in ("pp_microbatches", "pp_stages_per_rank", "pp_split"):
        if getattr(config, key):
            raise ConfigError(
                f"parallelism.{key} = {getattr(config, key)} means something with a pipeline "
                "only; set parallelism.pp, or leave it out"
            )


_ACTION = re.compile(r"(\d+)(F|B|I|W)(\d+)")


def _from_csv(config: Parallelism, in_flight: int) -> Schedule:
    """Stages and micro-batches that a file names, checked as far as no run of it is needed."""
    path = Path(config.pp_schedule)
    try:
        with path.open(newline="") as file:
            rows = [_ACTION.findall(" ".join(row)) for row in csv.reader(file) if row]
    except OSError as error:
        raise ConfigError(f"parallelism.pp_schedule = {path}: {error.strerror}") from error
    where = f"parallelism.pp_schedule = {path}"
    if len(rows) != config.pp:
        raise ConfigError(f"{where}: {len(rows)} rows of actions for pp = {config.pp} ranks")
    owners: dict[int, int] = {}
    done: dict[tuple[int, int], set[str]] = {}
    for rank, actions in enumerate(rows):
        for stage, kind, microbatch in actions:
            if owners.setdefault(int(stage), rank) != rank:
                raise ConfigError(
                    f"{where}: stage {stage} is on ranks {owners[int(stage)]}, {rank}"
                )
            done.setdefault((int(stage), int(microbatch)), set()).add(kind)
    if sorted(owners) != list(range(len(owners))):
        raise ConfigError(f"{where}: expected stages 0, 1, 2, ..., got {sorted(owners)}")
    for stage in owners:
        for microbatch in range(in_flight):
            kinds = done.get((stage, microbatch), set())
            if kinds not in ({"F", "B"}, {"F", "I", "W"}):
                raise ConfigError(
                    f"{where}: stage {stage}, micro-batch {microbatch} of {in_flight}: expected F "
                    f"and B, or F, I and W, got {', '.join(sorted(kinds)) or 'nothing'}"
                )
    if len(done) != len(owners) * in_flight:
        most = max(microbatch for _, microbatch in done) + 1
        raise ConfigError(
            f"{where} has {most} micro-batches and a run of it {in_flight}; set "
            f"parallelism.pp_microbatches = {most}"
        )
    splits = any("I" in kinds for kinds in done.values())
    ranks = tuple(owners[stage] for stage in range(len(owners)))
    return Schedule(path.name, ranks, in_flight, splits, path)


# ---------------------------------------------------------------------------- stages


def cut(costs: list[float], stages: int) -> list[int]:
    """Where each stage but the first begins, so that the dearest stage is as cheap as can be.

    >>> cut([4, 1, 1, 1, 1, 2], 3)
    [1, 4]
    """
    # Of the first `end` parts in `stage` stages: (dearest, sum of squares, starts). The squares
    # even out the other stages where the dearest leaves a choice.
    best: dict[tuple[int, int], tuple[float, float, list[int]]] = {(0, 0): (0.0, 0.0, [])}
    for stage in range(1, stages + 1):
        for end in range(stage, len(costs) + 1):
            choices = []
            for start in range(stage - 1, end):
                if (stage - 1, start) in best:
                    dearest, squares, starts = best[stage - 1, start]
                    here = sum(costs[start:end])
                    choices.append((max(dearest, here), squares + here**2, [*starts, start]))
            best[stage, end] = min(choices)
    return best[stages, len(costs)][2][1:]


def split_stages(units: list, schedule: Schedule, begin: list[str]) -> list[list]:
    """The units of each stage.

    Args:
        units: `models.units.Unit`, in order.
        begin: the first module of each stage but the first (`parallelism.pp_split`); empty: of
            equal cost.

    Raises:
        ConfigError: more stages than units, or names that are no first modules in order.
    """
    stages = len(schedule.stage_ranks)
    if stages > len(units):
        raise ConfigError(
            f"[parallelism]: {stages} pipeline stages, but the model has {len(units)} parts "
            f"({units[0].modules[0]}, {len(units) - 2} layers, {units[-1].modules[-1]}); use a "
            f"smaller pp or pp_stages_per_rank"
        )
    if not begin:
        starts = cut([unit.cost for unit in units], stages)
    else:
        starts = _named_starts(units, begin, stages)
    return [units[a:b] for a, b in zip([0, *starts], [*starts, len(units)], strict=True)]


def _named_starts(units: list, begin: list[str], stages: int) -> list[int]:
    names: Mapping[str, int] = {m: i for i, unit in enumerate(units) for m in unit.modules}
    unknown = [name for name in begin if name not in names]
    if unknown:
        known = [unit.modules[0] for unit in units]
        raise ConfigError(
            f"parallelism.pp_split: {unknown[0]!r} is no part of the model; expected of "
            f"{known[1]} ... {known[-2]}, {units[-1].modules[-1]}"
        )
    starts = [names[name] for name in begin]
    if len(starts) != stages - 1 or sorted({0, *starts}) != [0, *starts]:
        raise ConfigError(
            f"parallelism.pp_split = {begin}: expected the first modules of the stages 1 to "
            f"{stages - 1}, in order"
        )
    return starts
