"""Towers from Hugging Face directories: a SigLIP or SigLIP2 vision tower, a dense Qwen3.

    [model] flavor = "parts"
            vision_path   google/siglip2-*: of both towers the vision one is read
            text_path     Qwen/Qwen3-*: model_type qwen3

    vision.*    experts upcycled, if wanted       from vision_path
    text.*      experts and routers upcycled      from text_path
    the rest    projector, new experts            from the seed

A tower's parameters are read one at a time, as our model asks for them. Before the first step the
model answers texts without pictures as the language model in text_path does, its experts being
copies or shards of the MLPs. A shared expert, which no MLP there could become, adds 0 at first (its
last matrix is 0). With `upcycle_noise` the answers differ by about as much as the experts do.
"""

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titan_vlm.errors import ConfigError
from titan_vlm.models.config_json import checked, read_config_json, require
from titan_vlm.models.init import init_weights
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.omni.config import OmniConfig, VisionConfig
from titan_vlm.models.omni.upcycle import UpcycledVision
from titan_vlm.models.omni.vision import VisionTower
from titan_vlm.models.qwen3_vl import hf as qwen3_vl
from titan_vlm.models.qwen3_vl.config import TextConfig, even_sections
from titan_vlm.models.qwen3_vl.text import TextModel
from titan_vlm.models.qwen3_vl.upcycle import Upcycled, dense_text
from titan_vlm.models.safetensors_io import TensorInfo, read_headers
from titan_vlm.models.shards import copy_into


def read_parts_config(vision_path: str | Path, text_path: str | Path) -> OmniConfig:
    """The dimensions that the two `config.json` state.

    Raises:
        ConfigError: a file is missing or of a model that these towers do not compute.
    """
    vision = _read("vision_path", vision_path, vision_from_hf)
    text, tied = _read("text_path", text_path, text_from_hf)
    try:
        return OmniConfig(text, vision, tie_embeddings=tied)
    except ConfigError as error:
        raise ConfigError(f"{vision_path} with {text_path}: {error}") from error


def _read(setting: str, directory: str | Path, translate) -> Any:
    try:
        return read_config_json(directory, translate)
    except ConfigError as error:
        raise ConfigError(f"model.{setting} = {error}") from error


def vision_from_hf(hf: dict[str, Any]) -> VisionConfig:
    """From the `config.json` of a SigLIP or SigLIP2 model, or of its vision tower alone; a file
    leaves out what is as in the base model."""
    kind = hf.get("model_type")
    kinds = {"siglip", "siglip2", "siglip_vision_model", "siglip2_vision_model"}
    require(kind in kinds, f"model_type must be one of {', '.join(sorted(kinds))}, got {kind}")
    v, naflex = hf.get("vision_config", hf), kind.startswith("siglip2")
    activation = v.get("hidden_act", "gelu_pytorch_tanh")
    require(activation == "gelu_pytorch_tanh", f"hidden_act {activation}, not gelu_pytorch_tanh")
    require(not v.get("attention_dropout"), "attention_dropout must be 0")
    patch = v.get("patch_size", 16)
    side = v.get("image_size", 224) // patch
    vision = VisionConfig(
        depth=v.get("num_hidden_layers", 12),
        hidden_size=v.get("hidden_size", 768),
        intermediate_size=v.get("intermediate_size", 3072),
        num_heads=v.get("num_attention_heads", 12),
        in_channels=v.get("num_channels", 3),
        patch_size=patch,
        num_positions=v.get("num_patches", 256) if naflex else side**2,
        naflex=naflex,
        norm_eps=v.get("layer_norm_eps", 1e-6),
    )
    return checked(vision)


def text_from_hf(hf: dict[str, Any]) -> tuple[TextConfig, bool]:
    """From the `config.json` of a dense Qwen3; and whether its embeddings are tied. Reads the files
    of transformers 4 (`rope_theta`) and 5 (`rope_parameters`)."""
    kind = hf.get("model_type")
    require(kind == "qwen3", f"model_type must be qwen3, got {kind}")
    rope = hf.get("rope_parameters") or {
        **(hf.get("rope_scaling") or {}),
        "rope_theta": hf["rope_theta"],
    }
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require(rope_type == "default", f"rope_type must be default, got {rope_type}")
    require(hf.get("hidden_act", "silu") == "silu", "hidden_act must be silu")
    for key in ("attention_bias", "attention_dropout", "use_sliding_window"):
        require(not hf.get(key), f"{key} must be absent, false or 0")
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    published = TextConfig()
    same = head_dim == published.head_dim
    sections = published.mrope_section if same else tuple(even_sections(head_dim // 2))
    text = TextConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=head_dim,
        rope_theta=float(rope["rope_theta"]),
        mrope_section=sections,
        norm_eps=hf["rms_norm_eps"],
        max_positions=hf["max_position_embeddings"],
        initializer_range=hf.get("initializer_range", 0.02),
    )
    tied = hf.get("tie_word_embeddings", False)
    require(isinstance(tied, bool), f"tie_word_embeddings must be true or false, got {tied!r}")
    return checked(text), tied


def load_parts(
    model: nn.Module, vision_path: str | Path, text_path: str | Path, seed: int = 0
) -> None:
    """Fill an `Omni` (any dtype, any device, sharded or not, or a stage of a pipeline) from its
    parts; what neither has is drawn as for any new model.

    Raises:
        ConfigError: tensors that are missing or do not fit, or `dense_text`; the model is then
            unchanged.
    """
    config: OmniConfig = model.config
    tensors = ChainMap(vision_part(vision_path, config, seed), text_part(text_path, config, seed))
    fill_or_draw(model, tensors, seed)


@torch.no_grad()
def fill_or_draw(model: nn.Module, tensors: Mapping[str, Tensor], seed: int) -> None:
    """Copy the parameters that there are; draw the others by the seed."""
    found = {name for name, _ in model.named_parameters() if name in tensors}
    init_weights(model, seed, model.config.text.initializer_range, but=found)
    for name, parameter in model.named_parameters():
        if name in found:
            copy_into(parameter, tensors[name])


def vision_part(directory: str | Path, config: OmniConfig, seed: int) -> Mapping[str, Tensor]:
    """Of the vision tower all but its experts, or these, too, where they are upcycled."""
    vision = config.vision
    upcycled = vision.moe.upcycle_shards > 0
    with torch.device("meta"):
        tower = VisionTower(replace(vision, moe=MoEConfig()) if upcycled else vision)
    shapes = {
        f"vision.{name}": tuple(parameter.shape)
        for name, parameter in tower.named_parameters()
        if ".moe." not in name
    }
    part = VisionPart(directory, vision, shapes)
    return UpcycledVision(part, vision, config.text.initializer_range, seed) if upcycled else part


def text_part(directory: str | Path, config: OmniConfig, seed: int) -> Mapping[str, Tensor]:
    """Of decoder and head all, where the decoder has experts upcycled."""
    text = config.text
    if not text.num_experts:
        return TextPart(directory, text, config.tie_embeddings)
    dense = dense_text(text, directory)
    return Upcycled(TextPart(directory, dense, config.tie_embeddings), text, seed)


# Ours -> theirs; `#` is a number. Of a key without its last part, that part is the same in both.
_VISION = {
    "vision.patch_embed": "embeddings.patch_embedding",
    "vision.pos_embed": "embeddings.position_embedding",
    "vision.blocks.#.norm1": "encoder.layers.#.layer_norm1",
    "vision.blocks.#.attn.q": "encoder.layers.#.self_attn.q_proj",
    "vision.blocks.#.attn.k": "encoder.layers.#.self_attn.k_proj",
    "vision.blocks.#.attn.v": "encoder.layers.#.self_attn.v_proj",
    "vision.blocks.#.attn.o": "encoder.layers.#.self_attn.out_proj",
    "vision.blocks.#.norm2": "encoder.layers.#.layer_norm2",
    "vision.blocks.#.mlp.up": "encoder.layers.#.mlp.fc1",
    "vision.blocks.#.mlp.down": "encoder.layers.#.mlp.fc2",
    "vision.norm": "post_layernorm",
    "vision.pooling.probe.weight": "head.probe",
    "vision.pooling.attn.q.weight": "head.attention.in_proj_weight",
    "vision.pooling.attn.k.weight": "head.attention.in_proj_weight",
    "vision.pooling.attn.v.weight": "head.attention.in_proj_weight",
    "vision.pooling.attn.q.bias": "head.attention.in_proj_bias",
    "vision.pooling.attn.k.bias": "head.attention.in_proj_bias",
    "vision.pooling.attn.v.bias": "head.attention.in_proj_bias",
    "vision.pooling.attn.o": "head.attention.out_proj",
    "vision.pooling.norm": "head.layernorm",
    "vision.pooling.mlp.up": "head.mlp.fc1",
    "vision.pooling.mlp.down": "head.mlp.fc2",
}
_ROWS = re.compile(r"vision\.pooling\.attn\.([qkv])\.")


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a tower's checkpoint."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor there
    rows: slice | None = None


class VisionPart(Mapping[str, Tensor]):
    """The parameters of our vision tower, from the directory of a SigLIP or SigLIP2 model.

    Args:
        shapes: of our parameters ("vision. ...") by name.

    Raises:
        ConfigError: a tensor is missing or of another shape; names directory and tensor. All are
            checked before any is read.
    """

    def __init__(
        self, directory: str | Path, config: VisionConfig, shapes: Mapping[str, tuple[int, ...]]
    ):
        self.config, self.shapes = config, shapes
        self.infos = _vision_tensors(read_headers(directory))
        self.places = {name: _place(name, shape, config) for name, shape in shapes.items()}
        check_fit(directory, self.infos, self.places.values())

    def __getitem__(self, ours: str) -> Tensor:
        place, shape = self.places[ours], self.shapes[ours]
        tensor = self.infos[place.name].read(place.rows)
        if ours == "vision.patch_embed.weight" and self.config.naflex:
            # There the numbers of a patch are ordered by y, x, colour; here by colour, y, x.
            side = self.config.patch_size
            tensor = tensor.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)
        return tensor.reshape(shape)

    def __contains__(self, ours: object) -> bool:
        return ours in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _vision_tensors(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Of a model of both towers the vision one; without the prefix, which a tower saved by itself
    may lack."""
    found = {
        name.rpartition("vision_model.")[2]: info
        for name, info in infos.items()
        if "vision_model." in name
    }
    return found or dict(infos)


def _place(ours: str, shape: tuple[int, ...], config: VisionConfig) -> Place:
    theirs = _their_name(ours, _VISION)
    if match := _ROWS.match(ours):
        size, part = shape[0], "qkv".index(match[1])
        return Place(theirs, (3 * size, *shape[1:]), slice(part * size, (part + 1) * size))
    if ours == "vision.pooling.probe.weight":
        return Place(theirs, (1, *shape))
    if ours == "vision.patch_embed.weight" and not config.naflex:  # a convolution there
        side = config.patch_size
        return Place(theirs, (shape[0], config.in_channels, side, side))
    return Place(theirs, shape)


def _their_name(ours: str, names: Mapping[str, str]) -> str:
    pattern = re.sub(r"\.\d+\.", ".#.", ours)
    module, _, leaf = pattern.rpartition(".")
    theirs = names[pattern] if pattern in names else f"{names[module]}.{leaf}"
    number = re.search(r"\.(\d+)\.", ours)
    return theirs.replace("#", number[1]) if number else theirs


class TextPart(Mapping[str, Tensor]):
    """The parameters of our decoder and head, from the directory of a dense Qwen3.

    Raises:
        ConfigError: as `VisionPart`.
    """

    def __init__(self, directory: str | Path, text: TextConfig, tied: bool):
        with torch.device("meta"):
            decoder = TextModel(text)
        shapes = {f"text.{name}": tuple(p.shape) for name, p in decoder.named_parameters()}
        if not tied:
            shapes["lm_head.weight"] = shapes["text.embed.weight"]
        self.infos = read_headers(directory)
        self.places = {name: Place(_text_name(name), shape) for name, shape in shapes.items()}
        check_fit(directory, self.infos, self.places.values())

    def __getitem__(self, ours: str) -> Tensor:
        return self.infos[self.places[ours].name].read()

    def __contains__(self, ours: object) -> bool:
        return ours in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _text_name(ours: str) -> str:
    return qwen3_vl.their_name(ours).replace("model.language_model.", "model.")


def check_fit(directory: str | Path, infos: Mapping[str, TensorInfo], places) -> None:
    """Every place is there, with the shape it should have.

    Raises:
        ConfigError: names the first that is not.
    """
    for place in places:
        if place.name not in infos:
            raise ConfigError(f"{directory} does not fit the model: it has no {place.name}")
        if infos[place.name].shape != place.shape:
            raise ConfigError(
                f"{directory} does not fit the model: {place.name} is "
                f"{list(infos[place.name].shape)} there and {list(place.shape)} in the model"
            )
