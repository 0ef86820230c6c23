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
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig
from titan_vlm.models.qwen3_vl.hf import HFTensors, not_in_format
from titan_vlm.models.safetensors_io import read_headers

_MADE = re.compile(r"text\.layers\.(\d+)\.moe\.(experts\.gate_up|experts\.down|router\.weight)")


def load_hf(model: nn.Module, directory: str | Path, seed: int = 0) -> None:
    """Fill `model` from a Hugging Face directory, which with `moe.text.upcycle_shards` is dense.

    Raises:
        ConfigError: as `Upcycled` and `hf.HFTensors`; the model is then unchanged.
    """
    if not model.config.text.moe.upcycle_shards:
        return hf.load_hf(model, directory)
    tensors = Upcycled(directory, model.config, seed)
    hf.fill(model, tensors, directory, tensors.dense)


class Upcycled(Mapping[str, Tensor]):
    """Parameters by our names; experts and routers are made of the dense MLPs of `directory` when
    they are asked for (`models/moe/upcycle.py`).

    Raises:
        ConfigError: as `HFTensors`; or experts that cannot be made of such MLPs.
    """

    def __init__(self, directory: str | Path, config: Qwen3VLConfig, seed: int):
        self.config, self.seed = config, seed
        text = config.text
        if experts := hf.find_experts(read_headers(directory)):
            raise ConfigError(
                f"{directory} has experts ({experts}), and moe.text.upcycle_shards = "
                f"{text.moe.upcycle_shards} makes them of a dense model: give one in "
                "checkpoint.initial_load_path, or leave upcycle_shards out"
            )
        if unknown := not_in_format(config, weights_only=True):
            raise ConfigError(f"{directory}: nothing to make the {unknown[0]} of")
        shards = text.moe.upcycle_shards
        if text.moe_intermediate_size * shards != text.intermediate_size:
            raise ConfigError(
                f"moe.text.expert_width: {text.moe_intermediate_size} in {shards} shards is not "
                f"the dense layer's intermediate_size {text.intermediate_size}; expected "
                f"{text.intermediate_size / shards:g}"
            )
        none = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
        none |= {"decoder_sparse_step": 1, "mlp_only_layers": ()}
        self.dense = replace(config, text=replace(text, **none, moe=MoEConfig()))
        self.tensors = HFTensors(directory, self.dense)

    def __getitem__(self, name: str) -> Tensor:
        made = _MADE.fullmatch(name)
        if not made:
            return self.tensors[name]
        text, layer = self.config.text, f"text.layers.{made[1]}"
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
        dense = [self.tensors[f"{layer}.mlp.{matrix}.weight"] for matrix in ("gate", "up", "down")]
        if moe.upcycle_noise:  # which a lower precision would round away
            dense = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in dense]
        experts = split_experts(*dense, text.num_experts, moe.upcycle_shards)
        if moe.upcycle_noise:
            experts = add_noise(experts, moe.upcycle_noise, self.seed, f"{layer}.moe.experts")
        return getattr(experts, made[2].removeprefix("experts."))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
