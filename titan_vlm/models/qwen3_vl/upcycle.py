"""A Qwen3-VL with experts from a dense checkpoint: every expert begins as its layer's MLP."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.upcycle import add_noise, group_router, split_experts
from titan_vlm.models.qwen3_vl import hf
from titan_vlm.models.qwen3_vl.config import TextConfig
from titan_vlm.models.qwen3_vl.hf import HFTensors, not_in_format
from titan_vlm.models.safetensors_io import read_headers

_MADE = re.compile(
    r"text\.layers\.(\d+)\.moe\."
    r"(experts\.gate_up|experts\.down|router\.weight|shared\.mlp\.down\.weight)"
)


def load_hf(model: nn.Module, directory: str | Path, seed: int = 0) -> None:
    """Fill `model` from a Hugging Face directory, which with `moe.text.upcycle_shards` is dense.

    Raises:
        ConfigError: as `dense_text` and `hf.HFTensors`; the model is then unchanged.
    """
    config = model.config
    if not config.text.moe.upcycle_shards:
        return hf.load_hf(model, directory)
    text = dense_text(config.text, directory)
    if unknown := not_in_format(config, weights_only=True):
        raise ConfigError(f"{directory}: nothing to make the {unknown[0]} of")
    dense = replace(config, text=text)
    tensors = Upcycled(HFTensors(directory, dense), config.text, seed)
    hf.fill(model, tensors, directory, dense)


def dense_text(text: TextConfig, directory: str | Path) -> TextConfig:
    """The decoder in `directory` whose MLPs become the experts of `text`.

    Raises:
        ConfigError: it has experts, or MLPs that such experts cannot be made of.
    """
    shards = text.moe.upcycle_shards
    if experts := hf.find_experts(read_headers(directory)):
        raise ConfigError(
            f"{directory} has experts ({experts}), and moe.text.upcycle_shards = {shards} makes "
            "them of a dense model: give one, or leave upcycle_shards out"
        )
    if text.moe_intermediate_size * shards != text.intermediate_size:
        raise ConfigError(
            f"moe.text.expert_width: {text.moe_intermediate_size} in {shards} shards is not the "
            f"dense layer's intermediate_size {text.intermediate_size}; expected "
            f"{text.intermediate_size / shards:g}"
        )
    none = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
    none |= {"decoder_sparse_step": 1, "mlp_only_layers": ()}
    return replace(text, **none, moe=MoEConfig())


class Upcycled(Mapping[str, Tensor]):
    """The parameters of a decoder with experts, by our names: those of a dense one, and experts and
    routers that are made of its MLPs when they are asked for (`models/moe/upcycle.py`). Of a shared
    expert only the last matrix: 0, so that it adds nothing until it has learnt something.

    Args:
        dense: parameters of the model with the decoder `dense_text`.
        text: the decoder with experts.
    """

    def __init__(self, dense: Mapping[str, Tensor], text: TextConfig, seed: int):
        self.tensors, self.text, self.seed = dense, text, seed

    def __getitem__(self, name: str) -> Tensor:
        made = _MADE.fullmatch(name)
        if not made:
            return self.tensors[name]
        text, layer = self.text, f"text.layers.{made[1]}"
        moe = text.moe
        if made[2] == "router.weight":
            return group_router(
                text.num_experts,
                text.num_experts_per_tok,
                moe.upcycle_shards,
                text.hidden_size,
                text.initializer_range,
                self.seed,
                name,
            )
        if made[2].startswith("shared."):
            return torch.zeros(text.hidden_size, moe.shared_width)
        dense = [self.tensors[f"{layer}.mlp.{matrix}.weight"] for matrix in ("gate", "up", "down")]
        if moe.upcycle_noise:  # which a lower precision would round away
            dense = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in dense]
        experts = split_experts(*dense, text.num_experts, moe.upcycle_shards)
        if moe.upcycle_noise:
            experts = add_noise(experts, moe.upcycle_noise, self.seed, f"{layer}.moe.experts")
        return getattr(experts, made[2].removeprefix("experts."))

    def __contains__(self, name: object) -> bool:
        return name in self.tensors or bool(_MADE.fullmatch(str(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
