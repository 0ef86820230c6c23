"""Does a checkpoint compute the same here as in transformers?

    scripts/check_hf_parity.py DIR [--image FILE ...] [--dtype float64]
    scripts/check_hf_parity.py --quick          tiny random checkpoints, made by transformers

Loads a Hugging Face directory into both implementations and compares logits, loss and the gradient
of every parameter: a text, each image, and all images in one document, packed into padded rows
here and one by one there. In float64 transformers' casts to float32 are lifted, so that nothing
but a real difference is left; the model must fit in memory twice, with gradients.

Exit status: 0 the check holds, 1 it does not, 2 something must be changed to run it. The last line
is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from hf_reference import (
    Document,
    Errors,
    ask_ours,
    ask_reference,
    compare,
    load_reference,
    make_document,
    new_reference,
    pack,
    random_picture,
    tiny_config,
)
from PIL import Image

from titan_vlm.data.images import VisualSpec, image_grid, prepare_image
from titan_vlm.errors import DataError, UserError
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig
from titan_vlm.models.qwen3_vl.hf import HFTensors, default_layout, load_hf, read_config
from titan_vlm.models.qwen3_vl.model import Qwen3VL

# Errors are max|a - b| / max(max|b|, floor): logits and loss, gradients, floor.
LIMITS = {"float64": (1e-10, 1e-9, 1e-12), "float32": (1e-5, 1e-4, 1e-6)}


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    try:
        if arguments.directory:
            results = [check(Path(arguments.directory), arguments)]
        else:
            results = [check_random(moe, arguments) for moe in (False, True)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    worst = {name: max(result[name] for result in results) for name in results[0]}
    for_logits, for_gradients, _ = LIMITS[arguments.dtype]
    holds = max(worst["max_logits"], worst["max_loss"]) < for_logits
    holds = holds and worst["max_gradient"] < for_gradients
    print("the implementations agree" if holds else "THE IMPLEMENTATIONS DIFFER")
    print(json.dumps({"dtype": arguments.dtype, "holds": holds, **worst}))
    return 0 if holds else 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", metavar="DIR", nargs="?", help="a Hugging Face directory")
    parser.add_argument("--image", metavar="FILE", nargs="+", default=[], help="else: noise")
    parser.add_argument("--dtype", choices=tuple(LIMITS), default="float64")
    parser.add_argument(
        "--max-pixels", type=int, default=128 * 1024, help="of an image, 131072 if not given"
    )
    parser.add_argument("--quick", action="store_true", help="without DIR: tiny random checkpoints")
    arguments = parser.parse_args(argv)
    if not arguments.directory and not arguments.quick:
        parser.error("DIR is missing (or --quick, for a tiny random checkpoint)")
    return arguments


def check_random(moe: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """The check of a checkpoint that transformers makes of random weights."""
    with tempfile.TemporaryDirectory() as directory:
        new_reference(tiny_config(moe)).save_pretrained(directory)
        return check(Path(directory), arguments)


def check(directory: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Compare, print a table, return the worst errors."""
    dtype = getattr(torch, arguments.dtype)
    config = read_config(directory)
    warn_of_square_experts(directory, config)
    pictures = read_pictures(config, arguments)
    documents = make_documents(config, pictures)

    ours = Qwen3VL(config).to(dtype)
    load_hf(ours, directory)
    reference = load_reference(directory, dtype)
    rows = [documents[:1] + documents[2:], documents[1:2]]
    length = max(sum(len(d.tokens_S) for d in row) for row in rows) + 3
    errors = compare(
        ask_ours(ours, pack(rows, length, config, reference)),
        ask_reference(reference, [d for row in rows for d in row]),
        floor=LIMITS[arguments.dtype][2],
    )
    print_table(directory, config, errors)
    return {
        "max_logits": max(errors.logits.values()),
        "max_loss": errors.loss,
        "max_gradient": max(errors.gradients.values()),
    }


def warn_of_square_experts(directory: Path, config: Qwen3VLConfig) -> None:
    layouts = set(HFTensors(directory, config).layouts.values())
    if "published" in layouts and default_layout(config) == "transformers":
        print(
            "note: these expert tensors are in the published layout and one of them is square, "
            "which transformers reads transposed; scripts/convert.py --layout transformers writes "
            "a directory that it reads correctly"
        )


def read_pictures(config: Qwen3VLConfig, arguments: argparse.Namespace) -> list[tuple]:
    """(kind, grid, patches) of the files, or of one odd-sized picture and one video of noise."""
    vision = config.vision
    if not arguments.image:
        m = vision.merge_size
        noise = {"image": (1, 3 * m, 5 * m), "video": (2, 2 * m, 3 * m)}
        return [random_picture(config, kind, grid, seed=1) for kind, grid in noise.items()]
    sizes = (vision.patch_size, vision.merge_size, vision.temporal_patch_size)
    spec = VisualSpec(0, arguments.max_pixels, 0, arguments.max_pixels, 2.0, *sizes)
    pictures = []
    for file in arguments.image:
        try:
            image = Image.open(file).convert("RGB")
        except OSError as error:
            raise DataError(f"--image {file}: {error}") from error
        grid = image_grid(*image.size, spec)
        pictures.append(("image", grid, torch.from_numpy(prepare_image(image, grid, spec))))
    return pictures


def make_documents(config: Qwen3VLConfig, pictures: list[tuple]) -> list[Document]:
    groups = [[], *([picture] for picture in pictures)]
    if len(pictures) > 1:
        groups.append(pictures)
    return [make_document(config, group, seed) for seed, group in enumerate(groups)]


def print_table(directory: Path, config: Qwen3VLConfig, errors: Errors) -> None:
    kind = f"{config.text.num_experts} experts" if config.text.num_experts else "dense"
    print(f"{directory}: {config.text.num_layers} layers, {kind}")
    parts = {
        "logits": errors.logits,
        "loss": {"": errors.loss},
        "vision gradients": {n: e for n, e in errors.gradients.items() if ".visual." in n},
        "text gradients": {n: e for n, e in errors.gradients.items() if ".visual." not in n},
    }
    print(f"  {'error':>9}  {'of':>4}  worst")
    for part, values in parts.items():
        name = max(values, key=values.get)
        print(f"  {values[name]:9.2e}  {len(values):4}  {part}: {name}".rstrip(": "))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
