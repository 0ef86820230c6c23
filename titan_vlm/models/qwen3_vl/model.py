"""Qwen3-VL and Qwen3-VL-MoE: vision tower, decoder, head. Written as if there were one device."""

from torch import Tensor

from titan_vlm.models.inputs import Batch
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig
from titan_vlm.models.qwen3_vl.plan import tensor_plan
from titan_vlm.models.qwen3_vl.vision import VisionTower
from titan_vlm.models.vlm import VLM


class Qwen3VL(VLM):
    """The model of the Qwen3-VL technical report (arXiv 2511.21631).

    Equal to transformers' `Qwen3VL(Moe)ForConditionalGeneration`, but for the padding and the
    masks that packed documents make needless.
    """

    def __init__(self, config: Qwen3VLConfig):
        super().__init__(config, vision=VisionTower(config.vision))

    def features(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        return self.vision(batch)

    def whole_plan(self, ranks: int) -> dict[str, list[str]]:
        return tensor_plan(self.config, ranks)

    def branches(self) -> dict[str, list[str]]:
        branches: dict[str, list[str]] = {"vision": [], "projector": [], "text": []}
        for name, _ in self.named_parameters():
            if name.startswith(("vision.merger.", "vision.deepstack_mergers.")):
                branches["projector"].append(name)
            else:
                branches["vision" if name.startswith("vision.") else "text"].append(name)
        return branches
