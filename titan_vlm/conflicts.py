"""Settings that are each fine but do not go together."""

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import conflicts as moe_conflicts

if TYPE_CHECKING:
    from titan_vlm.config import Config, Eval
    from titan_vlm.data.config import Data, Samples


def conflicts(config: "Config") -> Iterator[str]:
    """Of a whole configuration, as messages that begin with the key to change."""
    model, data, training = config.model, config.data, config.training
    schedule, evaluation = config.schedule, config.eval

    if (model.flavor == "hf") != bool(model.hf_path):
        yield (
            'model.hf_path: expected a directory with flavor = "hf" and none with another flavor, '
            f'got flavor = "{model.flavor}" and hf_path = "{model.hf_path}"'
        )

    yield from parts_conflicts(config)
    yield from (mixture_conflicts if data.sources else one_source_conflicts)(data)
    for low, high in (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels")):
        least, most = getattr(data, low), getattr(data, high)
        if least > most:
            yield f"data.{low}: expected at most data.{high} ({most}), got {least}"

    resume = config.checkpoint.resume
    if resume not in ("auto", "none") and not resume.isdecimal():
        yield f'checkpoint.resume: expected "auto", "none" or a step such as "100", got "{resume}"'

    guards = config.guards
    if guards.on_spike == "skip" and not (guards.max_skips and guards.spike_zscore):
        yield (
            'guards.on_spike: expected "warn" with spike_zscore = 0 (nothing is a spike) or '
            'max_skips = 0 (nothing is skipped), got "skip"; set spike_zscore = 10, for instance'
        )

    if config.checkpoint.directory.startswith("memory:"):
        yield "checkpoint.directory: expected a place that outlives the process, got memory:"

    yield from moe_conflicts(config.moe)
    has_dense = config.checkpoint.initial_load_path or model.flavor == "parts"
    if config.moe.text.upcycle_shards and not has_dense:
        yield (
            "moe.text.upcycle_shards: expected a dense model's directory in "
            "checkpoint.initial_load_path, got none"
        )
    if config.moe.vision.upcycle_shards and model.flavor != "parts":
        yield (
            'moe.vision.upcycle_shards: expected 0 without model.flavor = "parts", whose '
            "model.vision_path has the dense layers"
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

    yield from held_out_conflicts(data, evaluation)


def parts_conflicts(config: "Config") -> Iterator[str]:
    """Of a model that is assembled from a vision tower and a decoder."""
    model, text = config.model, config.moe.text
    for key in ("vision_path", "text_path"):
        if (model.flavor == "parts") != bool(getattr(model, key)):
            yield (
                f'model.{key}: expected a directory with flavor = "parts" and none with another '
                f'flavor, got flavor = "{model.flavor}" and {key} = "{getattr(model, key)}"'
            )
    if model.flavor != "parts":
        return
    if config.checkpoint.initial_load_path:
        yield (
            'checkpoint.initial_load_path: expected none with model.flavor = "parts", whose '
            f'directories hold the weights, got "{config.checkpoint.initial_load_path}"'
        )
    if text.experts > 0 and not text.upcycle_shards:
        yield (
            'moe.text.upcycle_shards: expected 1 or more with model.flavor = "parts" and '
            f"moe.text.experts = {text.experts}, for model.text_path is dense; 1: each expert "
            "begins as a copy of its layer's MLP"
        )
    vision = config.moe.vision
    if vision.experts > 0 and not vision.upcycle_shards:
        yield (
            'moe.vision.upcycle_shards: expected 1 or more with model.flavor = "parts" and '
            f"moe.vision.experts = {vision.experts}, for the tower of model.vision_path is dense; "
            'with activation = "gelu" and expert_bias = true each expert begins as a copy of its '
            "layer's MLP"
        )


def one_source_conflicts(data: "Data") -> Iterator[str]:
    yield from path_conflicts("data", data)
    without = "without [[data.sources]]"
    if data.mixture_by != "samples":
        yield f'data.mixture_by: expected "samples" {without}, got "{data.mixture_by}"'
    if data.mixture_temperature != 1:
        yield f"data.mixture_temperature: expected 1 {without}, got {data.mixture_temperature}"


def mixture_conflicts(data: "Data") -> Iterator[str]:
    for key in ("path", "split", "kinds"):
        value, default = getattr(data, key), getattr(type(data)(), key)
        if value != default:
            yield (
                f"data.{key}: expected none beside [[data.sources]], whose tables have their own, "
                f'got "{value}"'
            )
    names = [table.name for table in data.sources]
    weighted = [table for table in data.sources if table.weight]
    if all(table.off for table in data.sources):
        yield "data.sources[0].off: expected false for one source at least"
    for k, table in enumerate(data.sources):
        key = f"data.sources[{k}]"
        if not table.name or table.name in names[:k]:
            other = "" if table.name else "; metrics and the ledger call the source by it"
            yield f'{key}.name: expected a name of its own, got "{table.name}"{other}'
        yield from path_conflicts(key, table)
        if weighted and not table.weight:
            yield (
                f'{key}.weight: expected a number > 0, as "{weighted[0].name}" has one, or a '
                "weight on no source; got none"
            )
    if weighted and data.mixture_temperature != 1:
        yield (
            "data.mixture_temperature: expected 1 where data.sources have weights, got "
            f"{data.mixture_temperature}; it makes weights of numbers of samples"
        )


def check_new(config: "Config") -> None:
    """Refuses what only a run that begins may not have: one that has begun with it goes on.

    Raises:
        ConfigError: a source's name.
    """
    for k, table in enumerate(config.data.sources):
        if {":", "/"} & set(table.name):  # they divide the ids of samples and the names of metrics
            raise ConfigError(
                f'data.sources[{k}].name: expected a name without ":" and "/" for a new run, got '
                f'"{table.name}"'
            )


def path_conflicts(key: str, samples: "Samples") -> Iterator[str]:
    if (samples.source == "digits") == bool(samples.path):
        yield (
            f"{key}.path: expected {'none' if samples.path else 'a file, directory or glob'} for "
            f'source = "{samples.source}", got "{samples.path}"'
        )
    if samples.kinds and samples.source != "digits":
        yield f'{key}.kinds: expected none for source = "{samples.source}", got {samples.kinds}'


def held_out_conflicts(data: "Data", evaluation: "Eval") -> Iterator[str]:
    has_splits = data.source in ("digits", "hf")
    if data.sources:
        yield from mixed_held_out_conflicts(data, evaluation)
        return
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


def mixed_held_out_conflicts(data: "Data", evaluation: "Eval") -> Iterator[str]:
    """Beside a mixture, data.source and eval.path name the held-out data."""
    if data.source == "digits" and evaluation.path:
        yield (
            "data.source: expected the format of eval.path, as [[data.sources]] may have several, "
            'got "digits"'
        )
    if evaluation.every and not evaluation.path and not holds_out_digits(data):
        yield (
            "eval.path: expected held-out data in the format of data.source, because eval.every is "
            f"{evaluation.every} and [[data.sources]] hold none out; or set eval.every = 0"
        )
    if not evaluation.path and data.source != "digits":
        yield (
            "data.source: expected none beside [[data.sources]] without eval.path, which nothing "
            f'else reads, got "{data.source}"'
        )
    for k, table in enumerate(data.sources):
        same = table.source == data.source
        if table.source == "digits":
            same = same and holds_out_digits(data) and evaluation.split == table.split
        else:
            same = same and bool(evaluation.path) and is_same_data(evaluation.path, table.path)
            same = same and (table.source != "hf" or evaluation.split == table.split)
        if same:
            yield (
                f"eval.{'split' if table.source == 'digits' else 'path'}: expected other data than "
                f"data.sources[{k}]: validation on samples trained on measures nothing"
            )


def holds_out_digits(data: "Data") -> bool:
    """Whether the demo is trained on, whose held-out split is always there."""
    kinds = {table.source for table in data.sources} or {data.source}
    return data.source == "digits" and "digits" in kinds


def is_same_data(eval_path: str, data_path: str) -> bool:
    """Whether `eval.path`, which may be left out, leads to the data of `data.path`."""
    return not eval_path or os.path.realpath(eval_path) == os.path.realpath(data_path)
