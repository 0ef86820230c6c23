"""Experts of a vision tower, made of the layers that a dense tower has.

A tower's layer is down(gelu(up x + b)) + c. Every expert begins as a copy of it, or as one of G
shards of its hidden units, as in `models/moe/upcycle.py`: an expert of shard g has that part of up,
b and down, the last times G, and all of c. The weights of a token's experts sum to 1, and it meets
each shard as often as any other, so that the first forward pass is the dense tower's.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.upcycle import group_router, perturb
from titan_vlm.models.omni.config import VisionConfig

_MADE = re.compile(r"(vision\.blocks\.(\d+))\.moe\.(experts\.(\w+)|router\.weight)")


class UpcycledVision(Mapping[str, Tensor]):
    """The parameters of a tower with experts, by our names.

    Args:
        dense: of the tower without.
        std: of a new router's weights.

    Raises:
        ConfigError: experts that cannot be made of such layers.
    """

    def __init__(self, dense: Mapping[str, Tensor], config: VisionConfig, std: float, seed: int):
        self.dense, self.config, self.std, self.seed = dense, config, std, seed
        moe, hidden = config.moe, config.intermediate_size
        if moe.expert_width * moe.upcycle_shards != hidden:
            raise ConfigError(
                f"moe.vision.expert_width: {moe.expert_width} in {moe.upcycle_shards} shards is "
                f"not the tower's intermediate_size {hidden}; expected "
                f"{hidden / moe.upcycle_shards:g}"
            )

    def __getitem__(self, name: str) -> Tensor:
        made = _MADE.fullmatch(name)
        if not made:
            return self.dense[name]
        block, matrix, moe = made[1], made[4], self.config.moe
        if matrix is None:
            width = self.config.hidden_size
            sizes = (moe.experts, moe.top_k, moe.upcycle_shards, width)
            return group_router(*sizes, self.std, self.seed, name)
        layer, _, kind = matrix.partition("_")
        dense = self.dense[f"{block}.mlp.{layer}.{kind or 'weight'}"]
        dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
        shards = {
            "up": lambda: self._cut(dense).transpose(1, 2),
            "up_bias": lambda: self._cut(dense).unsqueeze(1),
            "down": lambda: self._cut(dense.t()) * moe.upcycle_shards,
            "down_bias": lambda: dense.expand(moe.upcycle_shards, 1, -1),
        }[matrix]()
        experts = shards.repeat(moe.experts // moe.upcycle_shards, 1, 1)
        if moe.upcycle_noise and not kind:
            experts = perturb(experts, moe.upcycle_noise, self.seed, f"{name}/noise")
        return experts

    def _cut(self, units_F: Tensor) -> Tensor:
        """[F, ...] -> [G, F / G, ...]"""
        return units_F.unflatten(0, (self.config.moe.upcycle_shards, -1))

    def __contains__(self, name: object) -> bool:
        made = _MADE.fullmatch(str(name))
        return int(made[2]) in self.config.moe_layers if made else name in self.dense

    def __iter__(self) -> Iterator[str]:
        return iter(self.dense)

    def __len__(self) -> int:
        return len(self.dense)
