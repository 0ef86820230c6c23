"""OmniMoE in and out of Hugging Face directories, bit for bit.

    config.json             dimensions, [projector] and [moe.*]; names the code below (auto_map)
    *_titan_omni.py         that code, a copy of the folder `export`: torch and transformers alone
    model.safetensors       parameters, and what routers choose by, under our own names
    processor_config.json   how pictures become patches; tokenizer and chat template as usual

`AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)` and AutoProcessor
read it where titan_vlm is not installed.
"""

import copy
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titan_vlm.errors import ConfigError
from titan_vlm.models.config_json import checked, read_config_json, require
from titan_vlm.models.layers.head import whole
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.omni.config import OmniConfig, VisionConfig
from titan_vlm.models.omni.model import Omni
from titan_vlm.models.omni.parts import fill_or_draw
from titan_vlm.models.projector import Projector
from titan_vlm.models.qwen3_vl.config import TextConfig
from titan_vlm.models.qwen3_vl.hf import generation_config
from titan_vlm.models.qwen3_vl.upcycle import Upcycled, dense_text
from titan_vlm.models.safetensors_io import (
    TensorSpec,
    new_directory,
    read_headers,
    write_shards,
)
from titan_vlm.settings import build

logger = logging.getLogger("titan_vlm")

MODEL_TYPE = "titan_omni"
CODE = Path(__file__).with_name("export")
AUTO_MAP = {
    "AutoConfig": "modeling_titan_omni.TitanOmniConfig",
    "AutoModelForImageTextToText": "modeling_titan_omni.TitanOmniForConditionalGeneration",
    "AutoProcessor": "processing_titan_omni.TitanOmniProcessor",
}
# Ours -> theirs, which transformers' own code (caches, `generate`) asks a decoder's config for.
_TEXT = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
    "initializer_range": "initializer_range",
}
_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# Of a section [moe.*], what is of a run and not of the model; and what no tensor's shape shows.
_OF_A_RUN = ("upcycle_shards", "upcycle_noise", "dispatcher", "fused")
_ANSWERING = ("router", "score", "normalize", "route_scale", "n_groups", "topk_groups", "top_k")
_EXPERT_CHOICE = ("capacity_factor", "ec_chunk", "ec_fallback")


# ------------------------------------------------------------------------------------- config.json


def to_hf(config: OmniConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
    text, vision = config.text, config.vision
    text_config = {theirs: getattr(text, ours) for ours, theirs in _TEXT.items()} | {
        "model_type": "qwen3",
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        "mrope_section": list(text.mrope_section),
        "moe": _moe_to_hf(_text_moe(text)),
        "moe_layers": [i for i in range(text.num_layers) if text.is_moe_layer(i)],
        "tie_word_embeddings": config.tie_embeddings,
    }
    vision_config = asdict(vision) | {
        "moe": _moe_to_hf(vision.moe),
        "moe_layers": list(vision.moe_layers),
    }
    return {
        "architectures": ["TitanOmniForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "auto_map": AUTO_MAP,
        "dtype": dtype,
        "text_config": text_config,
        "vision_config": vision_config,
        "projector_config": asdict(config.projector) | {"moe": _moe_to_hf(config.projector_moe)},
        "tie_word_embeddings": config.tie_embeddings,
        **{name: getattr(config, name) for name in _IDS},
    }


def _text_moe(text: TextConfig) -> MoEConfig:
    """With the numbers that the run's section may have left to the flavour."""
    if not text.num_experts:
        return text.moe
    return replace(
        text.moe,
        experts=text.num_experts,
        top_k=text.num_experts_per_tok,
        expert_width=text.moe_intermediate_size,
    )


def _moe_to_hf(moe: MoEConfig) -> dict[str, Any]:
    default = MoEConfig()
    return asdict(replace(moe, **{name: getattr(default, name) for name in _OF_A_RUN}))


def from_hf(hf: dict[str, Any]) -> OmniConfig:
    """What `to_hf` was given."""
    kind = hf.get("model_type")
    require(kind == MODEL_TYPE, f"model_type must be {MODEL_TYPE}, got {kind}")
    t, v, p = (dict(hf[f"{part}_config"]) for part in ("text", "vision", "projector"))
    text_moe, vision_moe, projector_moe = (
        build(MoEConfig, part.pop("moe"), "config.json: moe") for part in (t, v, p)
    )
    text = TextConfig(
        **{ours: t[theirs] for ours, theirs in _TEXT.items()},
        rope_theta=float(t["rope_parameters"]["rope_theta"]),
        mrope_section=tuple(t["mrope_section"]),
        moe=text_moe,
    )
    if text_moe.experts > 0:
        text = replace(
            text,
            num_experts=text_moe.experts,
            num_experts_per_tok=text_moe.top_k,
            moe_intermediate_size=text_moe.expert_width,
            mlp_only_layers=tuple(i for i in range(text.num_layers) if i not in t["moe_layers"]),
        )
    names = {f.name for f in fields(VisionConfig)} - {"moe"}
    vision = VisionConfig(**{name: v[name] for name in names}, moe=vision_moe)
    config = OmniConfig(
        text=checked(text),
        vision=checked(vision),
        projector=build(Projector, p, "config.json: projector_config"),
        projector_moe=projector_moe,
        tie_embeddings=hf["tie_word_embeddings"],
        **{name: hf[name] for name in _IDS},
    )
    return checked(config)


def read_config(directory: str | Path) -> OmniConfig:
    """The model that a directory's `config.json` states.

    Raises:
        ConfigError: there is none, or it is of another architecture; names the file.
    """
    return read_config_json(directory, from_hf)


# ----------------------------------------------------------------------------------------- reading


@torch.no_grad()
def load_hf(model: nn.Module, directory: str | Path, seed: int = 0) -> None:
    """Fill an `Omni` (any dtype, any device, sharded or not, or a stage of a pipeline); with
    `moe.text.upcycle_shards` from a directory whose decoder is dense.

    Raises:
        ConfigError: as `HFTensors` and `dense_text`; the model is then unchanged.
    """
    config: OmniConfig = model.config
    if config.text.moe.upcycle_shards:
        dense = replace(config, text=dense_text(config.text, directory))
        held = HFTensors(directory, dense)
        fill_or_draw(model, Upcycled(held, config.text, seed), seed)
    else:
        dense, held = config, HFTensors(directory, config)
        fill_or_draw(model, held, seed)
    for name, buffer in model.named_buffers():
        if name in held:
            buffer.copy_(held[name])
    warn_of_other_settings(directory, dense)


class HFTensors(Mapping[str, Tensor]):
    """The tensors of a directory, each read when it is asked for.

    A directory without what a router chooses by (biases, thresholds) fits: they begin anew.

    Raises:
        ConfigError: a file is missing or damaged, or a tensor is missing, unexpected or of another
            shape; names them. Everything is checked before any tensor is read.
    """

    def __init__(self, directory: str | Path, config: OmniConfig):
        self.infos = read_headers(directory)
        wanted, buffers = shapes(config)
        here = wanted | {name: shape for name, shape in buffers.items() if name in self.infos}
        found = {
            "missing": [name for name in here if name not in self.infos],
            "unexpected": [name for name in self.infos if name not in here],
            "of another shape": [
                f"{name} is {list(self.infos[name].shape)} there and {list(shape)} in the model"
                for name, shape in here.items()
                if name in self.infos and self.infos[name].shape != shape
            ],
        }
        problems = [
            f"{len(names)} {kind}, the first {names[0]}" for kind, names in found.items() if names
        ]
        if problems:
            raise ConfigError(f"{directory} does not fit the model; tensors {'; '.join(problems)}")

    def __getitem__(self, name: str) -> Tensor:
        return self.infos[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __iter__(self):
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def shapes(config: OmniConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Of the parameters, and of the buffers that are saved with them, by name."""
    with torch.device("meta"):
        model = Omni(config)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    saved = model.state_dict().items()
    rest = {name: tuple(x.shape) for name, x in saved if name not in parameters.keys() | tied}
    return parameters, rest


def warn_of_other_settings(directory: str | Path, config: OmniConfig) -> None:
    """Say which settings that no tensor's shape shows differ from the directory's own."""
    if not (Path(directory) / "config.json").is_file():
        return
    here, there = (_answering(to_hf(x, "")) for x in (config, read_config(directory)))
    for key in (key for key in there if there[key] != here.get(key, there[key])):
        logger.warning(
            "%s was trained with %s = %s; the model has %s", directory, key, there[key], here[key]
        )


def _answering(hf: dict[str, Any]) -> dict[str, Any]:
    """The settings by which a model answers, flat, in the words of a run's sections."""
    found = {}
    for part in ("text", "vision", "projector"):
        section = hf[f"{part}_config"]
        moe = section.pop("moe")
        found |= {f"{part} {key}": value for key, value in section.items()}
        if moe["experts"] > 0:
            keys = _ANSWERING + (_EXPERT_CHOICE if moe["router"] == "expert_choice" else ())
            found |= {f"moe.{part}.{key}": moe[key] for key in keys}
    for key in ("max_position_embeddings", "initializer_range"):
        del found[f"text {key}"]
    return found


# ----------------------------------------------------------------------------------------- writing


def check_exportable(config: OmniConfig) -> None:
    """Refuse what the exported code does not compute.

    Raises:
        ConfigError: names one setting and its value.
    """
    branches = {"text": _text_moe(config.text), "vision": config.vision.moe}
    branches["projector"] = config.projector_moe
    for branch, moe in branches.items():
        refused = {"random", "balanced"} | ({"expert_choice"} if branch == "text" else set())
        if moe.experts > 0 and moe.router in refused:
            raise ConfigError(
                f'OmniMoE is not exported with moe.{branch}.router = "{moe.router}", by which it '
                "cannot answer token by token: choose another, or do not export "
                "(checkpoint.export_hf = false)"
            )
        if moe.experts > 0 and moe.asleep:
            raise ConfigError(
                f"OmniMoE is not exported with layers asleep (moe.{branch}.asleep = {moe.asleep}): "
                "end with a stage that wakes them, or do not export (checkpoint.export_hf = false)"
            )
    if config.text.attention_bias:
        raise ConfigError("OmniMoE is not exported with biases in the decoder's attention")


def save_hf(
    state: Mapping[str, Tensor],
    config: OmniConfig,
    directory: str | Path,
    *,
    tokenizer,
    processor_configs: Mapping[str, dict],
    dtype: torch.dtype,
    layout: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    write: bool = True,
) -> None:
    """Write a directory that transformers loads with `trust_remote_code=True`.

    It appears under its name when it is complete, in place of an older export.

    Args:
        state: our tensors by canonical name; one at a time is asked for. Sharded ones are gathered,
            so every rank must call this; those with `write=False` only take part.
        tokenizer: a transformers tokenizer with its chat template.
        processor_configs: file name -> content of the picture processors' files; the limits on
            pixels in preprocessor_config.json are what is read.
        layout: of the expert tensors; there is but "published".
    """
    check_exportable(config)
    parameters, buffers = shapes(config)
    if not write:
        for name in (*parameters, *buffers):
            whole(state[name])
        return
    if layout == "transformers":
        logger.warning("%s: experts are written as [E, D, 2F], which its code reads", directory)
    pixels = processor_configs["preprocessor_config.json"]["size"]
    files = {
        "config.json": to_hf(config, str(dtype).removeprefix("torch.")),
        "generation_config.json": generation_config(tokenizer),
        "processor_config.json": processor_config(config, tokenizer, pixels),
    }
    # What a router chooses by differs by thousandths: never rounded.
    specs = {name: TensorSpec(shape, dtype) for name, shape in parameters.items()}
    specs |= {name: TensorSpec(shape, torch.float64) for name, shape in buffers.items()}
    with new_directory(directory) as folder:
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = "left"  # answers begin where a row ends
        tokenizer.init_kwargs = tokenizer.init_kwargs | {"padding_side": "left"}  # what is saved
        tokenizer.save_pretrained(folder)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        for path in CODE.glob("*_titan_omni.py"):
            shutil.copyfile(path, folder / path.name)
        write_shards(folder, specs, lambda name: whole(state[name]), max_shard_bytes)


def processor_config(config: OmniConfig, tokenizer, pixels: Mapping[str, int]) -> dict[str, Any]:
    """processor_config.json; `pixels`: the shortest_edge and longest_edge of Qwen's processors,
    which are numbers of pixels."""
    names = tokenizer.convert_ids_to_tokens([config.image_token_id, config.video_token_id])
    vision = config.vision
    return {
        "processor_class": "TitanOmniProcessor",
        "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "min_pixels": pixels["shortest_edge"],
        "max_pixels": pixels["longest_edge"],
        "square": not vision.naflex,
        "frame_tokens": config.queries,
        "image_pad": names[0],
        "video_pad": names[1],
    }


def rewrite(
    tensors: HFTensors,
    config: OmniConfig,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    """An export's tensors in another folder; parameters in `dtype`, if it is given."""
    parameters, _ = shapes(config)
    specs = {
        name: TensorSpec(info.shape, dtype if dtype and name in parameters else info.dtype)
        for name, info in tensors.infos.items()
    }
    write_shards(folder, specs, tensors.__getitem__, max_shard_bytes)
