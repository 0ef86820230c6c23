"""Settings that are each fine but do not go together."""

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from titan_vlm.models.moe.config import conflicts as moe_conflicts

if TYPE_CHECKING:
    from titan_vlm.config import Config


def conflicts(config: "Config") -> Iterator[str]:
    """Of a whole configuration, as messages that begin with the key to change."""
    model, data, training = config.model, config.data, config.training
    schedule, evaluation = config.schedule, config.eval

    if (model.flavor == "hf") != bool(model.hf_path):
        yield (
            'model.hf_path: expected a directory with flavor = "hf" and none with another flavor, '
            f'got flavor = "{model.flavor}" and hf_path = "{model.hf_path}"'
        )

    if (data.source == "digits") == bool(data.path):
        yield (
            f"data.path: expected {'none' if data.path else 'a file, directory or glob'} for "
            f'source = "{data.source}", got "{data.path}"'
        )
    for low, high in (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels")):
        least, most = getattr(data, low), getattr(data, high)
        if least > most:
            yield f"data.{low}: expected at most data.{high} ({most}), got {least}"

    resume = config.checkpoint.resume
    if resume not in ("auto", "none") and not resume.isdecimal():
        yield f'checkpoint.resume: expected "auto", "none" or a step such as "100", got "{resume}"'

    yield from moe_conflicts(config.moe)
    if config.moe.text.upcycle_shards and not config.checkpoint.initial_load_path:
        yield (
            "moe.text.upcycle_shards: expected a dense model's directory in "
            "checkpoint.initial_load_path, got none"
        )
    kind, interval = config.parallelism.expert_placement, config.parallelism.eplb_interval
    if (kind == "balanced") != bool(interval):
        expected = "a number of steps" if kind == "balanced" else "0"
        yield (
            f"parallelism.eplb_interval: expected {expected} with expert_placement = "
            f'"{kind}", got {interval}'
        )

    quantize = config.quantize
    if quantize.experts != "none" and training.dtype != "bfloat16":
        yield (
            f'quantize.experts: expected "none" with training.dtype = "{training.dtype}", for only '
            f'bfloat16 products are quantised, got "{quantize.experts}"'
        )
    if quantize.emulate and quantize.experts == "none":
        yield 'quantize.emulate: expected false with quantize.experts = "none", got true'

    rows, micro = training.global_batch_size, training.micro_batch_size
    if rows % micro:
        multiples = [n for n in (rows - rows % micro, rows - rows % micro + micro) if n > 0]
        small = [d for d in range(1, math.isqrt(rows) + 1) if rows % d == 0]
        divisors = {*small, *(rows // d for d in small)}
        micros = sorted(sorted(divisors, key=lambda d: abs(d - micro))[:2])
        all_rows, all_micro = (" or ".join(map(str, numbers)) for numbers in (multiples, micros))
        yield (
            f"training.global_batch_size: expected a multiple of training.micro_batch_size "
            f"({micro}), got {rows}; nearest that work: global_batch_size = {all_rows}, "
            f"or micro_batch_size = {all_micro}"
        )

    if schedule.warmup_steps > training.steps:
        most = f"training.steps ({training.steps})"
        yield f"schedule.warmup_steps: expected at most {most}, got {schedule.warmup_steps}"
    if (schedule.kind == "wsd") != (schedule.decay_steps > 0):
        yield (
            'schedule.decay_steps: expected at least 1 with kind = "wsd" and 0 with the others, '
            f'got {schedule.decay_steps} with kind = "{schedule.kind}"'
        )
    if schedule.warmup_steps + schedule.decay_steps > training.steps:
        yield (
            "schedule.decay_steps: expected at most training.steps - schedule.warmup_steps "
            f"({training.steps - schedule.warmup_steps}), got {schedule.decay_steps}"
        )

    has_splits = data.source in ("digits", "hf")
    is_same = is_same_data(evaluation.path, data.path)
    if data.source == "digits" and evaluation.path:
        yield f'eval.path: expected none for source = "digits", got "{evaluation.path}"'
    if evaluation.every and not has_splits and not evaluation.path:
        yield (
            f'eval.path: expected held-out data, because source = "{data.source}" has no '
            f"validation split and eval.every is {evaluation.every}; or set eval.every = 0"
        )
    if evaluation.path and is_same and not has_splits:
        yield (
            f'eval.path: expected other data than data.path ("{data.path}"): '
            "validation on samples trained on measures nothing"
        )
    if has_splits and is_same and evaluation.split == data.split:
        yield (
            f'eval.split: expected another split than data.split ("{data.split}"): '
            "validation on samples trained on measures nothing"
        )


def is_same_data(eval_path: str, data_path: str) -> bool:
    """Whether `eval.path`, which may be left out, leads to the data of `data.path`."""
    return not eval_path or os.path.realpath(eval_path) == os.path.realpath(data_path)
