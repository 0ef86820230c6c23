"""Does transformers answer as we do? Our greedy decoding against transformers' own `generate`.

    .venv/bin/python scripts/check_export.py runs/qwen_vlm_moe --samples 50

Both sides read the run's export (`hf/`) in float32. Ours prepares the held-out questions with the
trainer's own data code; transformers' side renders the exported chat template and prepares the
pictures with transformers' processor from the exported files (the whole processor where
torchvision is installed, which its video part needs; else the tokenizer and the image processor).
The generated token ids must be the same for every sample, and every tensor must have been loaded.
Samples with a video, or without a question and an answer, are left out and counted.
`--quick` without a run makes a tiny export of random weights first. Exit status 0 only where all
agree, 2 where something must be changed to run it; the last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from titan_vlm.assembly import Parts, assemble, assemble_export, export
from titan_vlm.config import Config, load_config
from titan_vlm.data.chat import Encoder, for_template, text_of
from titan_vlm.data.sample import RawSample
from titan_vlm.data.sources import build_held_out
from titan_vlm.data.tokenizer import IMAGE_PAD
from titan_vlm.errors import ConfigError, UserError
from titan_vlm.evaluation.validate import last_assistant_turn, make_prompt, shown
from titan_vlm.inference.generate import greedy
from titan_vlm.models.init import init_weights
from titan_vlm.training.curriculum import last_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", help="directory of a finished run with an export")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="at most 10 samples")
    arguments = parser.parse_args()
    samples = min(arguments.samples, 10) if arguments.quick else arguments.samples
    try:
        if arguments.run:
            folder = Path(arguments.run)
            config = load_config(str(folder / "config.toml"))
            return report(*compare(last_config(config), folder / "hf", samples))
        if not arguments.quick:
            parser.error("expected the directory of a run, or --quick")
        with tempfile.TemporaryDirectory() as folder:
            config = load_config("qwen_vlm_moe.toml")
            random_export(config, Path(folder) / "hf")
            return report(*compare(config, Path(folder) / "hf", samples))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def random_export(config: Config, directory: Path) -> None:
    """An export of weights wide enough for answers to depend on the question."""
    parts = assemble(config)
    model = parts.spec.build(parts.dims)
    init_weights(model, 0, std=0.15)
    export(parts, model.state_dict(), directory, "float32")


def compare(
    config: Config, directory: Path, samples: int
) -> tuple[list[RawSample], list[list[int]], list[list[int]], Parts]:
    """Samples, our tokens and transformers' tokens for each."""
    parts = assemble_export(config)
    chosen = choose(build_held_out(config), samples)
    prompts = [raw.messages[: last_assistant_turn(raw.messages)] for raw in chosen]
    longest, stop = config.eval.max_new_tokens, parts.tokenizer.eos_token_id

    model = parts.spec.build(parts.dims).eval()
    parts.spec.load_hf(model, str(directory))
    encoder = Encoder(parts.tokenizer, parts.images)
    ours = greedy(model, [make_prompt(encoder, p) for p in prompts], {stop}, longest, "cpu")

    theirs = load_theirs(directory)
    prepare = preparation(directory)
    answers = [generate(theirs, prepare(p), stop, longest) for p in prompts]
    return chosen, ours, answers, parts


def choose(source, samples: int) -> list[RawSample]:
    """The first samples that can be compared: with a question and an answer, and no video.

    Raises:
        ConfigError: there is none.
    """
    if samples < 1:
        raise ConfigError(f"--samples {samples}: expected at least 1")
    chosen, left_out = [], Counter()
    for i in range(len(source)):
        raw = source[i]
        kinds = {part["type"] for message in raw.messages for part in parts_of(message)}
        if not last_assistant_turn(raw.messages):
            left_out["without a question and an answer"] += 1
        elif "video" in kinds:
            left_out["with a video"] += 1
        else:
            chosen.append(raw)
        if len(chosen) == samples:
            break
    for reason, count in left_out.items():
        print(f"samples left out, {reason}: {count}")
    if not chosen:
        raise ConfigError("none of the held-out samples can be compared")
    return chosen


def load_theirs(directory: Path) -> torch.nn.Module:
    """The export in transformers.

    Raises:
        ConfigError: a tensor is missing, unexpected or of another shape.
    """
    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    problems = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if problems:
        raise ConfigError(f"{directory}: transformers expects other tensors: {problems}")
    return model.eval()


def preparation(directory: Path) -> Callable[[list[dict]], dict]:
    """A function from messages to what `generate` takes, by transformers' code alone."""
    if is_torchvision_available() or any(directory.glob("processing_*.py")):
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
        return partial(prepare_whole, processor)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    pictures = Qwen2VLImageProcessorPil.from_pretrained(directory)
    return partial(prepare_parts, tokenizer, pictures)


def prepare_whole(processor, messages: list[dict]) -> dict:
    """The inputs by the complete processor."""
    text = processor.apply_chat_template(
        for_template(messages), tokenize=False, add_generation_prompt=True
    )
    return dict(processor(text=[text], images=images_of(messages) or None, return_tensors="pt"))


def prepare_parts(tokenizer, pictures, messages: list[dict]) -> dict:
    """The same without the processor: each placeholder repeated once per visual token."""
    text = tokenizer.apply_chat_template(
        for_template(messages), tokenize=False, add_generation_prompt=True
    )
    inputs = {}
    if images := images_of(messages):
        inputs = dict(pictures(images, return_tensors="pt"))
        pieces = text.split(IMAGE_PAD)
        for i, grid in enumerate(inputs["image_grid_thw"]):
            pieces[i] += IMAGE_PAD * int(grid.prod() // pictures.merge_size**2)
        text = "".join(pieces)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    is_image = ids == tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    return inputs | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": is_image.int(),
    }


@torch.no_grad()
def generate(model, inputs: dict, stop: int, max_new_tokens: int) -> list[int]:
    """transformers' greedy answer, without the token that ended it."""
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    return new[: new.index(stop)] if stop in new else new


def images_of(messages: list[dict]) -> list[Image.Image]:
    refs = [p["image"] for m in messages for p in parts_of(m) if p["type"] == "image"]
    return [ref.load_rgb() for ref in refs]


def parts_of(message: dict) -> list[dict]:
    return message["content"] if isinstance(message["content"], list) else []


def report(
    samples: list[RawSample], ours: list[list[int]], theirs: list[list[int]], parts: Parts
) -> int:
    """Print a few answers and the figures; 0 where all agree."""
    decode = parts.tokenizer.decode
    right = wrong = 0
    for i, (raw, a, b) in enumerate(zip(samples, ours, theirs, strict=True)):
        turn = last_assistant_turn(raw.messages)
        expected = text_of(raw.messages[turn])
        right += decode(b).strip() == expected.strip()
        wrong += a != b
        if i < 5 or a != b:
            question = shown(raw.messages[turn - 1])
            print(f"  {question} ours {decode(a)!r} transformers {decode(b)!r} right {expected!r}")
    figures = {
        "samples": len(samples),
        "max_mismatched_samples": wrong,
        "accuracy": right / len(samples),
    }
    print(json.dumps(figures))
    return 0 if wrong == 0 and samples else 1


if __name__ == "__main__":
    sys.exit(main())
