"""Qwen3-VL in and out of Hugging Face directories, streaming, bit for bit.

Two layouts of the expert tensors are in circulation (E experts, D model width, F expert width):

                      gate_up_proj     down_proj
    "published"       [E, D, 2F]       [E, F, D]       Qwen's checkpoints, vLLM, this program
    "transformers"    [E, 2F, D]       [E, D, F]       what transformers 5 saves

One of the two tensors may be square (2F = D, or F = D), never both, so the pair tells the layouts
apart for any dimensions. Readers that look at one tensor at a time cannot: transformers transposes
a tensor whose shape is not the one it expects, hence reads a square one as its own layout; vLLM
transposes always, hence reads every one as published. So

- no square tensor: both read "published" correctly, and vLLM refuses "transformers";
- 2F = D or F = D: transformers silently misreads "published". "transformers" it reads correctly,
  and vLLM, which can read only the other, stops at the tensor that is not square.

`default_layout` is therefore "published" in the first case and "transformers" in the second,
where no layout suits both and this is the one that nobody misreads without an error.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_vlm.errors import ConfigError
from titan_vlm.models.config_json import read_config_json
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig, VisionConfig, from_hf, to_hf
from titan_vlm.models.qwen3_vl.model import Qwen3VL
from titan_vlm.models.safetensors_io import (
    TensorInfo,
    TensorSpec,
    new_directory,
    read_headers,
    write_shards,
)
from titan_vlm.models.shards import copy_into

logger = logging.getLogger("titan_vlm")
Layout = Literal["published", "transformers"]

# Ours -> theirs; `#` is a number. Of a key without its last part, that part is the same in both.
_NAMES = {
    "text.embed": "model.language_model.embed_tokens",
    "text.norm": "model.language_model.norm",
    "text.layers.#.attn_norm": "model.language_model.layers.#.input_layernorm",
    "text.layers.#.attn.q": "model.language_model.layers.#.self_attn.q_proj",
    "text.layers.#.attn.k": "model.language_model.layers.#.self_attn.k_proj",
    "text.layers.#.attn.v": "model.language_model.layers.#.self_attn.v_proj",
    "text.layers.#.attn.o": "model.language_model.layers.#.self_attn.o_proj",
    "text.layers.#.attn.q_norm": "model.language_model.layers.#.self_attn.q_norm",
    "text.layers.#.attn.k_norm": "model.language_model.layers.#.self_attn.k_norm",
    "text.layers.#.mlp_norm": "model.language_model.layers.#.post_attention_layernorm",
    "text.layers.#.mlp.gate": "model.language_model.layers.#.mlp.gate_proj",
    "text.layers.#.mlp.up": "model.language_model.layers.#.mlp.up_proj",
    "text.layers.#.mlp.down": "model.language_model.layers.#.mlp.down_proj",
    "text.layers.#.moe.router": "model.language_model.layers.#.mlp.gate",
    "text.layers.#.moe.experts.gate_up": "model.language_model.layers.#.mlp.experts.gate_up_proj",
    "text.layers.#.moe.experts.down": "model.language_model.layers.#.mlp.experts.down_proj",
    "vision.patch_embed": "model.visual.patch_embed.proj",
    "vision.pos_embed": "model.visual.pos_embed",
    "vision.blocks.#.norm1": "model.visual.blocks.#.norm1",
    "vision.blocks.#.attn.q": "model.visual.blocks.#.attn.qkv",
    "vision.blocks.#.attn.k": "model.visual.blocks.#.attn.qkv",
    "vision.blocks.#.attn.v": "model.visual.blocks.#.attn.qkv",
    "vision.blocks.#.attn.o": "model.visual.blocks.#.attn.proj",
    "vision.blocks.#.norm2": "model.visual.blocks.#.norm2",
    "vision.blocks.#.mlp.up": "model.visual.blocks.#.mlp.linear_fc1",
    "vision.blocks.#.mlp.down": "model.visual.blocks.#.mlp.linear_fc2",
    "vision.merger.norm": "model.visual.merger.norm",
    "vision.merger.fc1": "model.visual.merger.linear_fc1",
    "vision.merger.fc2": "model.visual.merger.linear_fc2",
    "vision.deepstack_mergers.#.norm": "model.visual.deepstack_merger_list.#.norm",
    "vision.deepstack_mergers.#.fc1": "model.visual.deepstack_merger_list.#.linear_fc1",
    "vision.deepstack_mergers.#.fc2": "model.visual.deepstack_merger_list.#.linear_fc2",
    "lm_head": "lm_head",
}
_EXPERTS = re.compile(r"text\.layers\.(\d+)\.moe\.experts\.")
# Of a decoder, in the files of Qwen's models and in those that OmniMoE writes.
_EXPERTS_THERE = re.compile(r"(\.mlp|text\.layers\.\d+\.moe)\.experts\.")
_VISION_QKV = re.compile(r"vision\.blocks\.\d+\.attn\.([qkv])\.")


@dataclass(frozen=True)
class Link:
    """Where a parameter lies in a checkpoint: ours = theirs[rows], transposed, reshaped."""

    ours: str
    shape: tuple[int, ...]
    theirs: str
    their_shape: tuple[int, ...]
    rows: slice | None = None
    transposed: bool = False

    def to_ours(self, tensor: Tensor) -> Tensor:
        """A view of `theirs[rows]` as our parameter."""
        return (tensor.transpose(1, 2) if self.transposed else tensor).reshape(self.shape)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """A view of our parameter as `theirs[rows]`."""
        if self.transposed:
            return tensor.transpose(1, 2)
        rows = self.their_shape[0] if self.rows is None else self.rows.stop - self.rows.start
        return tensor.reshape(rows, *self.their_shape[1:])


def links(config: Qwen3VLConfig, layouts: Mapping[int, Layout]) -> list[Link]:
    """A link for every parameter of the model; `layouts` of MoE layers, else "published"."""
    with torch.device("meta"):
        model = Qwen3VL(config)
    return [_link(n, tuple(p.shape), config, layouts) for n, p in model.named_parameters()]


def _link(
    ours: str, shape: tuple[int, ...], config: Qwen3VLConfig, layouts: Mapping[int, Layout]
) -> Link:
    theirs = their_name(ours)
    if match := _EXPERTS.match(ours):
        experts, rows, columns = shape
        if layouts.get(int(match[1])) == "transformers":
            return Link(ours, shape, theirs, (experts, columns, rows), transposed=True)
    if match := _VISION_QKV.match(ours):
        size, part = shape[0], "qkv".index(match[1])
        rows = slice(part * size, (part + 1) * size)
        return Link(ours, shape, theirs, (3 * size, *shape[1:]), rows)
    if ours == "vision.patch_embed.weight":  # a convolution there, a matmul here
        vision = config.vision
        kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        return Link(ours, shape, theirs, (shape[0], vision.in_channels, *kernel))
    return Link(ours, shape, theirs, shape)


def their_name(ours: str) -> str:
    """The Hugging Face name of the tensor that holds our parameter."""
    pattern = re.sub(r"\.\d+\.", ".#.", ours)
    if pattern in _NAMES:
        theirs = _NAMES[pattern]
    else:
        module, _, leaf = pattern.rpartition(".")
        theirs = f"{_NAMES[module]}.{leaf}"
    number = re.search(r"\.(\d+)\.", ours)
    return theirs.replace("#", number[1]) if number else theirs


def default_layout(config: Qwen3VLConfig) -> Layout:
    """The layout to write for these dimensions; the module docstring gives the reasons."""
    width, hidden = config.text.hidden_size, config.text.moe_intermediate_size
    square = config.text.num_experts > 0 and width in (hidden, 2 * hidden)
    return "transformers" if square else "published"


# ------------------------------------------------------------------------------------- reading


class HFTensors(Mapping[str, Tensor]):
    """Our parameters, each read from a Hugging Face directory when it is asked for.

    Raises:
        ConfigError: a file is missing or damaged, or a tensor is missing, unexpected or of another
            shape; names files and tensors. Everything is checked before any tensor is read.
    """

    def __init__(self, directory: str | Path, config: Qwen3VLConfig):
        self.directory = Path(directory)
        if unknown := not_in_format(config, weights_only=True):
            raise ConfigError(f"{directory}: a Qwen3-VL checkpoint has no {unknown[0]}")
        # A bare `Qwen3VL(Moe)Model` was saved without the "model." that it has inside the whole.
        self.infos = {
            re.sub(r"^(language_model|visual)\.", r"model.\1.", name): info
            for name, info in read_headers(directory).items()
        }
        _refuse_dense(directory, self.infos, config)
        self.layouts = _find_layouts(self.infos, config)
        self.links = {link.ours: link for link in links(config, self.layouts)}
        _check_fit(self.directory, self.infos, list(self.links.values()), config)

    def __getitem__(self, ours: str) -> Tensor:
        link = self.links[ours]
        return link.to_ours(self.info(ours).read(link.rows))

    def info(self, ours: str) -> TensorInfo:
        """What the file says about the tensor that holds our parameter."""
        return self.infos[self.links[ours].theirs]

    def __iter__(self) -> Iterator[str]:
        return iter(self.links)

    def __len__(self) -> int:
        return len(self.links)


def load_hf(model: nn.Module, directory: str | Path) -> None:
    """Fill a model (any dtype, any device, sharded or not) from a Hugging Face directory.

    Host memory needed beyond the model: the part of one tensor that is read.

    Raises:
        ConfigError: as `HFTensors`; the model is then unchanged.
    """
    fill(model, HFTensors(directory, model.config), directory, model.config)


@torch.no_grad()
def fill(
    model: nn.Module, tensors: Mapping[str, Tensor], directory: str | Path, config: Qwen3VLConfig
) -> None:
    """Copy each tensor to where the model has it; warn where the directory states other settings
    than `config`."""
    _warn_of_other_settings(Path(directory), config)
    for name, parameter in model.named_parameters():
        copy_into(parameter, tensors[name])


def find_experts(names: Iterable[str]) -> str | None:
    """The first of a checkpoint's tensors that holds experts."""
    return next((name for name in names if _EXPERTS_THERE.search(name)), None)


def _refuse_dense(
    directory: str | Path, infos: Mapping[str, TensorInfo], config: Qwen3VLConfig
) -> None:
    """Say what to do with a dense checkpoint for a model with experts, instead of what it lacks."""
    for i in filter(config.text.is_moe_layer, range(config.text.num_layers)):
        dense = their_name(f"text.layers.{i}.mlp.gate.weight")
        if dense in infos and not find_experts(infos):
            raise ConfigError(
                f"{directory} is dense ({dense}), and the model has {config.text.num_experts} "
                "experts there: set moe.text.upcycle_shards (1: each begins as a copy of the "
                "layer's MLP) with experts, top_k and expert_width, or choose a dense model.flavor"
            )


def _find_layouts(infos: Mapping[str, TensorInfo], config: Qwen3VLConfig) -> dict[int, Layout]:
    """Each MoE layer's layout: the one that both of its tensors fit."""
    text, layouts = config.text, {}
    width, hidden, experts = text.hidden_size, text.moe_intermediate_size, text.num_experts
    for i in filter(text.is_moe_layer, range(text.num_layers)):
        names = [their_name(f"text.layers.{i}.moe.experts.{name}") for name in ("gate_up", "down")]
        shapes = [infos[name].shape if name in infos else None for name in names]
        transposed = [(experts, 2 * hidden, width), (experts, width, hidden)]
        layouts[i] = "transformers" if shapes == transposed else "published"
    return layouts


def _check_fit(
    directory: Path, infos: Mapping[str, TensorInfo], wanted: list[Link], config: Qwen3VLConfig
) -> None:
    shapes = {link.theirs: link.their_shape for link in wanted}
    missing = [name for name in shapes if name not in infos]
    wrong = [
        f"{name} is {list(infos[name].shape)} there and {list(shape)} in the model"
        for name, shape in shapes.items()
        if name in infos and infos[name].shape != shape
    ]
    # Old checkpoints hold rotary frequencies, which follow from the configuration.
    extra = [name for name in infos if name not in shapes and not name.endswith(".inv_freq")]
    if "lm_head.weight" in extra and config.tie_embeddings:
        extra.remove("lm_head.weight")
        _check_tied(directory, infos)
    found = [("missing", missing), ("unexpected", extra), ("of another shape", wrong)]
    problems = [f"{len(names)} {kind}: {_some(names)}" for kind, names in found if names]
    if problems:
        raise ConfigError(f"{directory} does not fit the model; tensors {'; '.join(problems)}")


def _check_tied(directory: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Some exporters write a tied head as well; it may only repeat the embedding."""
    head, embed = infos["lm_head.weight"], infos.get(their_name("text.embed.weight"))
    if embed and not torch.equal(head.read(), embed.read()):
        raise ConfigError(
            f"{directory}: lm_head.weight differs from {embed.name}, but the model ties them "
            "(tie_word_embeddings)"
        )


def _some(names: list[str], limit: int = 5) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _warn_of_other_settings(directory: Path, config: Qwen3VLConfig) -> None:
    """Say which settings that no tensor's shape shows differ from the checkpoint's own."""
    if not (directory / "config.json").is_file():
        return
    theirs = read_config(directory)
    for part in ("text", "vision"):
        here, there = asdict(getattr(config, part)), asdict(getattr(theirs, part))
        ignored = ("max_positions", "initializer_range", "moe", "projector_moe")
        for key in (key for key in here if here[key] != there[key] and key not in ignored):
            logger.warning(
                "%s was trained with %s %s = %s; the model has %s",
                directory,
                part,
                key,
                there[key],
                here[key],
            )


def read_config(directory: str | Path) -> Qwen3VLConfig:
    """The dimensions that a directory's `config.json` states.

    Raises:
        ConfigError: there is none, or it is of another architecture; names the file.
    """
    return read_config_json(directory, from_hf)


def not_in_format(config: Qwen3VLConfig, weights_only: bool = False) -> list[str]:
    """What of a model Qwen3-VL's format has no place for, each with the setting that asks for it.

    Args:
        weights_only: leave out what has no weights, but computes something else.
    """
    found = []
    for branch, moe in (("vision", config.vision.moe), ("projector", config.vision.projector_moe)):
        if moe.experts > 0:
            found.append(f"experts in the {branch} ({_setting(moe, 'experts', branch)})")
    if not config.text.num_experts:
        return found
    text = config.text.moe
    weights = {"shared_width": "shared expert", "expert_bias": "biases of experts"}
    weights["activation"] = "experts of another kind"
    if text.router == "noisy_topk":
        weights["router"] = "weights of a router's noise"
    keys = sorted(text.unlike_qwen3, key=lambda key: key not in weights)
    for key in keys:
        if weights_only and key not in weights:
            continue
        noun = weights.get(key, "routing but softmax over the top-k that sums to 1")
        found.append(f"{noun} ({_setting(text, key)})")
    return found


def _setting(moe: MoEConfig, key: str, branch: str = "text") -> str:
    """As it stands in a configuration."""
    return f"moe.{branch}.{key} = {json.dumps(getattr(moe, key))}"


# ------------------------------------------------------------------------------------- writing


def check_exportable(config: Qwen3VLConfig) -> None:
    """Refuse what transformers would compute otherwise, or not at all.

    Raises:
        ConfigError: names one setting and its value.
    """
    if unknown := not_in_format(config):
        raise ConfigError(
            f"Qwen3-VL's Hugging Face format has no {unknown[0]}: leave that out, or do not export "
            "(checkpoint.export_hf = false)"
        )


def save_hf(
    state: Mapping[str, Tensor],
    config: Qwen3VLConfig,
    directory: str | Path,
    *,
    tokenizer,
    processor_configs: Mapping[str, dict],
    dtype: torch.dtype,
    layout: Layout | None = None,
    max_shard_bytes: int = 5_000_000_000,
    write: bool = True,
) -> None:
    """Write a directory that transformers' `from_pretrained` and vLLM load.

    It appears under its name when it is complete, in place of an older export.

    Args:
        state: our parameters by canonical name; one at a time is asked for. Sharded ones are
            gathered, so every rank must call this; those with `write=False` only take part.
        tokenizer: a transformers tokenizer with its chat template.
        processor_configs: file name -> content of the picture processors' files.
        layout: of the expert tensors; None is `default_layout(config)`.
    """
    check_exportable(config)
    if not write:
        for group in _groups(config, "published").values():
            for link in group:
                _whole(state[link.ours])
        return
    files = {
        "config.json": to_hf(config, str(dtype).removeprefix("torch.")),
        "generation_config.json": generation_config(tokenizer),
        **processor_configs,
    }
    if config.vision.rope_theta != VisionConfig.rope_theta:
        logger.warning(
            "%s: vision rope_theta = %s is in config.json, but transformers 4 and vLLM compute "
            "with %s whatever it says",
            directory,
            config.vision.rope_theta,
            VisionConfig.rope_theta,
        )
    with new_directory(directory) as folder:
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        tokenizer.save_pretrained(folder)
        write_weights(state, config, folder, lambda _: dtype, layout, max_shard_bytes)


@torch.no_grad()
def write_weights(
    state: Mapping[str, Tensor],
    config: Qwen3VLConfig,
    folder: Path,
    dtype_of: Callable[[str], torch.dtype],
    layout: Layout | None,
    max_shard_bytes: int,
) -> None:
    """The safetensors files; `dtype_of` a parameter (canonical name) in them."""
    suited = default_layout(config)
    if layout not in (None, suited) and config.text.num_experts:
        logger.warning(
            "expert tensors are written in the layout %r, which transformers or vLLM misreads for "
            "these dimensions; %r is the safe one",
            layout,
            suited,
        )
    groups = _groups(config, layout or suited)

    def produce(theirs: str) -> Tensor:
        parts = [link.to_theirs(_whole(state[link.ours])) for link in groups[theirs]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    specs = {
        theirs: TensorSpec(group[0].their_shape, dtype_of(group[0].ours))
        for theirs, group in groups.items()
    }
    write_shards(folder, specs, produce, max_shard_bytes)


def _groups(config: Qwen3VLConfig, layout: Layout) -> dict[str, list[Link]]:
    """For each tensor of a checkpoint the parameters it is made of, in the order of its rows."""
    groups: dict[str, list[Link]] = {}
    for link in links(config, dict.fromkeys(range(config.text.num_layers), layout)):
        groups.setdefault(link.theirs, []).append(link)
    return groups


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def generation_config(tokenizer) -> dict:
    """Where generation ends; how to sample is left to whoever generates."""
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    return {name: value for name, value in ids.items() if value is not None}
