"""What does not go together, and why: refused by name at start, and a table in the documentation.

`python -m titan_vlm.parallel.support` prints the table; `docs/parallelism.md` holds a copy, and a
test compares the two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from titan_vlm.config import Config
from titan_vlm.distributed import device_type
from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import LIBRARIES
from titan_vlm.parallel.schedules import KINDS, Schedule


@dataclass(frozen=True)
class Case:
    """What a run is made of, as far as it decides what goes together."""

    config: Config
    degrees: Mapping[str, int]
    schedule: Schedule | None
    dims: Any

    @property
    def splits_backward(self) -> bool:
        return self.schedule is not None and self.schedule.splits_backward

    @property
    def expert_ranks(self) -> int:
        over_tp = self.config.parallelism.expert_parallel_over_tp
        return self.degrees["ep"] * (self.degrees["tp"] if over_tp else 1)

    @property
    def has_library_dispatcher(self) -> bool:
        moe = self.config.moe
        return any(b.dispatcher in LIBRARIES for b in (moe.text, moe.vision, moe.projector))


@dataclass(frozen=True)
class Conflict:
    """Two things that exclude each other. `holds` is true of a run that has both."""

    first: str
    second: str
    why: str
    instead: str
    holds: Callable[[Case], bool]


SPLIT = ", ".join(name for name, kind in KINDS.items() if kind.splits_backward)
WHOLE = ", ".join(name for name, kind in KINDS.items() if not kind.splits_backward)

CONFLICTS = (
    Conflict(
        "parallelism.pp > 1",
        "tied embeddings",
        "the one matrix would be on the first and on the last stage",
        "use a model that does not tie them, or pp = 1",
        lambda case: case.schedule is not None and case.dims.tie_embeddings,
    ),
    Conflict(
        f"a schedule that splits the backward pass ({SPLIT})",
        "compile.enable",
        "a compiled backward pass gives all gradients of a block at once, and would run twice",
        f"use one of {WHOLE}",
        lambda case: case.splits_backward and case.config.compile.enable,
    ),
    Conflict(
        f"a schedule that splits the backward pass ({SPLIT})",
        "activation_checkpoint.mode other than none",
        "a block would be run again for each of its weights (and selective allows one pass only)",
        f"use one of {WHOLE}",
        lambda case: case.splits_backward and case.config.activation_checkpoint.mode != "none",
    ),
    Conflict(
        f"a schedule that splits the backward pass ({SPLIT})",
        "parallelism.async_tp",
        "products and exchanges are one operation there, and would run twice",
        f"use one of {WHOLE}",
        lambda case: case.splits_backward and case.config.parallelism.async_tp,
    ),
    Conflict(
        f"a schedule that splits the backward pass ({SPLIT})",
        "quantize.experts",
        "a quantised product gives both of its gradients at once, and would run twice",
        f"use one of {WHOLE}",
        lambda case: case.splits_backward and case.config.quantize.experts != "none",
    ),
    Conflict(
        "parallelism.async_tp",
        "tp = 1 or sequence_parallel = false",
        "there is no exchange of positions to hide",
        "set both, or leave async_tp out",
        lambda case: (
            case.config.parallelism.async_tp
            and (case.config.parallelism.tp == 1 or not case.config.parallelism.sequence_parallel)
        ),
    ),
    Conflict(
        f"moe.*.dispatcher = {', '.join(LIBRARIES)}",
        "experts on one rank (parallelism.ep = 1)",
        "nothing is exchanged there, and the library would be neither used nor looked for",
        'use "all_to_all", which on one rank does without exchange, too, or ep > 1',
        lambda case: case.has_library_dispatcher and case.expert_ranks == 1,
    ),
    Conflict(
        "training.attention_dropout",
        "training.dtype = bfloat16 on CUDA",
        "FlashAttention draws its random numbers in an order that depends on the mesh",
        "leave it out, or take float32",
        lambda case: (
            case.config.training.attention_dropout > 0
            and case.config.training.dtype == "bfloat16"
            and device_type(case.config.run.device) == "cuda"
        ),
    ),
)


def refuse_combinations(
    config: Config, degrees: Mapping[str, int], schedule: Schedule | None, dims: Any
) -> None:
    """Refuse a run that has both sides of a conflict.

    Raises:
        ConfigError: names both, why, and what to do.
    """
    case = Case(config, degrees, schedule, dims)
    for conflict in CONFLICTS:
        if conflict.holds(case):
            raise ConfigError(
                f"{conflict.first} does not go with {conflict.second}: {conflict.why}; "
                f"{conflict.instead}"
            )


def table() -> str:
    """The conflicts as Markdown; everything that is not in it goes together."""
    lines = ["| this | does not go with | because | instead |", "|---|---|---|---|"]
    lines += [f"| {c.first} | {c.second} | {c.why} | {c.instead} |" for c in CONFLICTS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
