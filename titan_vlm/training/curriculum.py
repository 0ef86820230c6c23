"""A run in stages: the section [[curriculum.stages]], what a stage may change, and where a run is.

    [[curriculum.stages]]                      Config of the file       Config of the stage
    name = "align"                             training.freeze = []     ["vision", "text"]
    steps = 2000                       ->      optimizer.lr = 1e-4      1e-3
    training.freeze = ["vision", "text"]       data.max_pixels = ...    50176
    optimizer.lr = 1e-3                        and all that it does not name, as it is
    data.max_pixels = 50176

Each stage is the file with some keys changed: a whole Config, checked as any other. So are its own
training.steps, and its [schedule] counts from its own beginning. Nothing here imports torch.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Any

from titan_vlm.conflicts import conflicts
from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import LOSSES
from titan_vlm.models.projector import is_pooled
from titan_vlm.settings import MAX_INT, rest, setting, update

if TYPE_CHECKING:
    from titan_vlm.config import Config

UNITS = ("steps", "tokens", "samples")
_ROUTING = (
    *("top_k", "capacity_factor", "min_capacity", "dropout", "noise", "noise_eps"),
    *("bias_speed", "asleep"),
    *LOSSES,
    *(f"anneal.{loss}" for loss in LOSSES),
)
# What a stage may change: nothing that a tensor's shape, the mesh or a sample's place depends on.
MAY_CHANGE = (
    "training.freeze",
    "training.seq_len",
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.attention_dropout",
    *(f"optimizer.{key}" for key in ("lr", "branch_lr", "betas", "eps", "weight_decay")),
    *(f"schedule.{key}" for key in ("kind", "warmup_steps", "decay_steps", "min_lr_ratio")),
    *(f"data.{kind}_pixels" for kind in ("min", "max", "video_min", "video_max")),
    "data.mixture_temperature",
    "data.sources.*.weight",
    "data.sources.*.off",
    *(f"moe.*.{key}" for key in _ROUTING),
    "projector.depth",
    "projector.levels",
)


@dataclass(frozen=True)
class StageSettings:
    """One table [[curriculum.stages]]; its other keys are those of the file that it changes."""

    name: str = setting("", "What events, logs and checkpoints call the stage.")
    steps: int = setting(0, "How long it is, in optimizer steps,", at_least=0)
    tokens: int = setting(0, "or in tokens that are no padding,", at_least=0)
    samples: int = setting(0, "or in samples.", at_least=0)
    changes: dict[str, Any] = rest()


@dataclass(frozen=True)
class Curriculum:
    stages: list[StageSettings] = setting(
        [],
        "Stages of the run, each a table [[curriculum.stages]] with a name, a length and the "
        "settings that it changes, as in optimizer.lr = 1e-3 (docs/curriculum.md).",
    )


@dataclass(frozen=True)
class Length:
    """Of a stage: so many "steps", "tokens" or "samples"."""

    unit: str
    amount: int


def stage_configs(config: "Config") -> list[tuple[str, Length, "Config"]]:
    """Name, length and whole configuration of each stage; one without a name where there is no
    curriculum.

    Raises:
        ConfigError: names the stage and the key.
    """
    stages = config.curriculum.stages
    if not stages:
        return [("", Length("steps", config.training.steps), config)]
    found: list[tuple[str, Length, Config]] = []
    for number, stage in enumerate(stages):
        where = f'curriculum.stages[{number}] ("{stage.name}")'
        if not stage.name or stage.name in [name for name, _, _ in found]:
            raise ConfigError(f"{where}: name: expected a name of its own")
        for key in _keys(stage.changes):
            _check_key(key, where)
        length = _length(stage, where)
        changed = update(config, stage.changes, where)
        steps = length.amount if length.unit == "steps" else MAX_INT  # as many as it takes
        changed = replace(
            changed, curriculum=Curriculum(), training=replace(changed.training, steps=steps)
        )
        for conflict in conflicts(changed):
            raise ConfigError(f"{where}: {conflict}")
        if found:
            _check_awake(found[-1][2], changed, where)
            _check_levels(found[-1][2], changed, where)
        found.append((stage.name, length, changed))
    return found


def curriculum_conflicts(config: "Config") -> Iterator[str]:
    """Of the file with its stages, as messages that begin with the key to change."""
    steps, default = config.training.steps, type(config.training)().steps
    if config.curriculum.stages and steps != default:
        yield (
            "training.steps: leave it out beside [[curriculum.stages]], which have lengths of "
            f"their own; got {steps}"
        )


def last_config(config: "Config") -> "Config":
    """What a finished run of `config` computes with."""
    return stage_configs(config)[-1][2]


def known_ends(config: "Config") -> list[int]:
    """The last step of each stage, as far as it is known before: a stage may be as long as its
    tokens or samples last."""
    lengths = [length for _, length, _ in stage_configs(config)]
    return list(accumulate(x.amount for x in takewhile(lambda x: x.unit == "steps", lengths)))


def total_steps(config: "Config") -> int | None:
    """Of the whole run, where it is known."""
    ends = known_ends(config)
    return ends[-1] if len(ends) == len(stage_configs(config)) else None


def asleep(config: "Config") -> list[str]:
    """The layers whose experts sleep in a stage, as branch.number."""
    branches = {"text": config.moe.text, "vision": config.moe.vision}
    return [f"{name}.{i}" for name, branch in branches.items() for i in sorted(branch.asleep)]


def _length(stage: StageSettings, where: str) -> Length:
    given = {unit: getattr(stage, unit) for unit in UNITS if getattr(stage, unit)}
    if len(given) != 1:
        shown = " and ".join(f"{unit} = {n}" for unit, n in given.items()) or "none"
        raise ConfigError(f"{where}: steps: expected one of {', '.join(UNITS)}, got {shown}")
    return Length(*next(iter(given.items())))


def _keys(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a nested table, down to those that a stage may change."""
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and not _may_change(key):
            yield from _keys(value, f"{key}.")
        else:
            yield key


def _may_change(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def _check_key(key: str, where: str) -> None:
    if _may_change(key):
        return
    branches = [f"moe.{branch}." for branch in ("text", "vision", "projector")]
    known = [p.replace("moe.*.", b) for p in MAY_CHANGE for b in branches]
    nearest = difflib.get_close_matches(key, ["name", *UNITS, *known], n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"{where}: {key}: no setting that a stage can change; the nearest is {nearest}"
    )


def _check_levels(before: "Config", after: "Config", where: str) -> None:
    """A level's weights go on with what its stage sends through them: patches or summaries."""
    was, now = before.projector.levels, after.projector.levels
    if [is_pooled(level) for level in was] != [is_pooled(level) for level in now]:
        raise ConfigError(
            f"{where}: projector.levels: expected {len(was)} of them, with pooled in the places "
            f"where the stage before has it ({', '.join(was) or 'none'}), got "
            f"{', '.join(now) or 'none'}"
        )


def _check_awake(before: "Config", after: "Config", where: str) -> None:
    for branch in ("text", "vision"):
        was, now = getattr(before.moe, branch).asleep, getattr(after.moe, branch).asleep
        if tired := sorted(set(now) - set(was)):
            raise ConfigError(
                f"{where}: moe.{branch}.asleep: expected none but {was}, those of the stage "
                f"before, got {tired}: experts that have learned cannot be put to sleep"
            )


def check_still_awake(place: "Place", config: "Config") -> None:
    """Raises: ConfigError, where a run's stage has layers asleep that were awake in it before."""
    before = asleep(config) if place.asleep is None else place.asleep
    if tired := sorted(set(asleep(config)) - set(before)):
        branch, _, layer = tired[0].partition(".")
        raise ConfigError(
            f'curriculum.stages ("{place.stage}"): moe.{branch}.asleep: layer {layer} was awake in '
            "the run to resume, and experts that have learned cannot be put to sleep"
        )


# ---------------------------------------------------------------------------- where a run is


@dataclass
class Place:
    """Where a run is in its curriculum. Part of every checkpoint, the same on all ranks.

    began             the run's step after which the stage began
    tokens, samples   that the global batches have held since then
    asleep            the layers that slept in it; None: nobody knows
    """

    stage: str = ""
    began: int = 0
    tokens: int = 0
    samples: int = 0
    asleep: list[str] | None = None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def count(self, counts: Mapping[str, float]) -> None:
        """A step, of which `counts` are summed over all ranks."""
        self.tokens += int(counts["tokens"])
        self.samples += int(counts["samples"])

    def done(self, step: int, unit: str) -> int:
        """How much of the stage is done after the run's step `step`."""
        return step - self.began if unit == "steps" else getattr(self, unit)

    def is_over(self, step: int, length: Length) -> bool:
        """Whether the stage has its length after the run's step `step`."""
        return self.done(step, length.unit) >= length.amount

    def schedule(self, step: int, length: Length) -> tuple[int, float]:
        """The stage's step that follows the run's step `step`, counted from 0, and how many steps
        the stage has: of one in tokens or samples, as many as at its pace so far."""
        steps, done = step - self.began, self.done(step, length.unit)
        if length.unit == "steps":
            return steps, length.amount
        return steps, steps * length.amount / done if done else float("inf")
