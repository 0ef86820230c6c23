"""Write a Hugging Face directory from another one, or from a training checkpoint.

    scripts/convert.py SOURCE TARGET [--layout L] [--dtype T] [--config TOML]

SOURCE is either
- a Hugging Face directory: everything but the weights is copied as it is; the expert tensors get
  the other layout, the weights the other type, if asked for;
- a checkpoint of a run, runs/NAME/checkpoints/step-000100: a whole new directory, with the
  tokenizer and the picture processors of the run's config.toml.

One tensor at a time is in memory.
"""

import argparse
import json
import math
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from titan_vlm.assembly import assemble, export
from titan_vlm.config import Config, load_config
from titan_vlm.errors import ConfigError, UserError
from titan_vlm.models.config_json import read_config_json
from titan_vlm.models.omni import hf as omni
from titan_vlm.models.qwen3_vl.hf import HFTensors, read_config, write_weights
from titan_vlm.models.safetensors_io import INDEX, new_directory
from titan_vlm.training.curriculum import stage_configs
from titan_vlm.training.state import unpack

DTYPES = ("bfloat16", "float32", "float64")


def main(argv: list[str]) -> int:
    """Exit status: 0 when TARGET is written, 2 when the user must change something."""
    arguments = parse(argv)
    source, target = Path(arguments.source), Path(arguments.target)
    try:
        if source.resolve() == target.resolve():
            raise ConfigError(f"SOURCE and TARGET are both {source}")
        if (source / "config.json").is_file():
            if arguments.config:
                raise ConfigError(f"--config is for a training checkpoint; {source} is none")
            convert_directory(source, target, arguments)
        elif (source / ".metadata").is_file():
            convert_checkpoint(source, target, arguments)
        else:
            raise ConfigError(
                f"{source} is neither a Hugging Face directory (config.json) nor a training "
                "checkpoint (.metadata)"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {target}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET", help="replaced if it holds an older export")
    parser.add_argument(
        "--layout",
        choices=("auto", "published", "transformers"),
        default="auto",
        help="expert tensors as [E, D, 2F] and [E, F, D] (published) or [E, 2F, D] and [E, D, F] "
        "(transformers); auto: what transformers and vLLM load for these dimensions",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="type of the weights; otherwise that of a Hugging Face SOURCE, or bfloat16",
    )
    parser.add_argument(
        "--config", metavar="TOML", help="a checkpoint's run; otherwise its config.toml"
    )
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a file (5)")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.max_shard_gb < math.inf:  # false for nan, too
        parser.error("--max-shard-gb must be positive and finite")
    return arguments


def convert_directory(source: Path, target: Path, arguments: argparse.Namespace) -> None:
    """Hugging Face to Hugging Face."""
    content = read_config_json(source, dict)
    is_omni = content.get("model_type") == omni.MODEL_TYPE
    if is_omni and arguments.layout == "transformers":
        raise ConfigError(f"--layout transformers: the code in {source} reads published alone")
    config = (omni.read_config if is_omni else read_config)(source)
    tensors = (omni.HFTensors if is_omni else HFTensors)(source, config)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    with new_directory(target) as folder:
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
                shutil.copy2(path, folder)
        if dtype:
            (folder / "config.json").write_text(_with_dtype(content, arguments.dtype))
        if is_omni:
            omni.rewrite(tensors, config, folder, dtype, _shard_bytes(arguments))
            return
        write_weights(
            tensors,
            config,
            folder,
            lambda name: dtype or tensors.info(name).dtype,
            _layout(arguments),
            _shard_bytes(arguments),
        )


def _with_dtype(content: dict, dtype: str) -> str:
    """config.json with another type, wherever the file states one (`torch_dtype` is old)."""
    for part in (content, content["text_config"], content["vision_config"]):
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = dtype
    return json.dumps(content, indent=2) + "\n"


def convert_checkpoint(source: Path, target: Path, arguments: argparse.Namespace) -> None:
    """Training checkpoint to Hugging Face."""
    run = source.resolve().parent.parent  # SOURCE may be a bare name, from inside checkpoints/
    toml = Path(arguments.config) if arguments.config else run / "config.toml"
    if not toml.is_file():
        raise ConfigError(f"{toml} is missing; --config names the configuration of the run")
    parts = assemble(config_of_stage(load_config(str(toml)), source))
    parts.spec.check_exportable(parts.dims)
    state = CheckpointTensors(source)
    with torch.device("meta"):
        model = parts.spec.build(parts.dims)
    state.check(model)
    export(
        parts,
        state,
        target,
        arguments.dtype or "bfloat16",
        layout=_layout(arguments),
        max_shard_bytes=_shard_bytes(arguments),
    )


def config_of_stage(config: Config, source: Path) -> Config:
    """Of the stage of its curriculum that a checkpoint is in."""
    if not config.curriculum.stages:
        return config
    state = {"train": {"rank0": b""}}
    dcp.load(state, storage_reader=dcp.FileSystemReader(source), no_dist=True)
    name = unpack(state["train"]["rank0"])["caller"].get("stage", {}).get("stage")
    for known, _, own in stage_configs(config):
        if known == name:
            return own
    raise ConfigError(f"{source} is of a stage {name!r}, which the configuration does not have")


class CheckpointTensors(Mapping[str, Tensor]):
    """The model's parameters in a checkpoint, each read when it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        self.infos = {
            name.removeprefix("model."): info
            for name, info in metadata.items()
            if name.startswith("model.") and isinstance(info, TensorStorageMetadata)
        }

    def check(self, model: nn.Module) -> None:
        """Raises: ConfigError, unless it has all parameters and saved buffers of `model`, and no
        others."""
        state = model.state_dict()
        own = [*model.named_parameters(), *model.named_buffers()]  # a tied one once
        shapes = {name: tuple(x.shape) for name, x in own if name in state}
        wrong = [
            name
            for name, shape in shapes.items()
            if name not in self.infos or tuple(self.infos[name].size) != shape
        ]
        if wrong:
            raise ConfigError(
                f"{self.folder} is a checkpoint of another model: {len(wrong)} parameters are "
                f"missing or of another shape, the first is {wrong[0]}"
            )
        placed = ("slots_E", "replicas_E")  # where experts were, which `export` puts in order
        if more := [x for x in self.infos if x not in state and not x.endswith(placed)]:
            raise ConfigError(
                f"{self.folder} is a checkpoint of another model: it has {more[0]}, which a model "
                "of this configuration has not"
            )

    def __getitem__(self, name: str) -> Tensor:
        info = self.infos[name]
        tensor = torch.empty(info.size, dtype=info.properties.dtype)
        with warnings.catch_warnings():  # one process without a group is no mistake
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({f"model.{name}": tensor}, checkpoint_id=self.folder)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _layout(arguments: argparse.Namespace) -> str | None:
    return None if arguments.layout == "auto" else arguments.layout


def _shard_bytes(arguments: argparse.Namespace) -> int:
    return int(arguments.max_shard_gb * 1e9)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
