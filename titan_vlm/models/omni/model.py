"""OmniMoE: SigLIP2, a DeepStack projector, Qwen3; experts in any of the three. Written as if there
were one device.

    pixels -> vision -> scales -> projector -> features [M, D] -> in place of the visual tokens
                                           +-> levels [M, D]   -> added behind decoder layers
"""

from torch import Tensor

from titan_vlm.models.inputs import Batch
from titan_vlm.models.omni.config import OmniConfig
from titan_vlm.models.omni.plan import tensor_plan
from titan_vlm.models.omni.projector import Projector
from titan_vlm.models.omni.vision import VisionTower
from titan_vlm.models.vlm import VLM


class Omni(VLM):
    """See the module docstring."""

    def __init__(self, config: OmniConfig):
        super().__init__(config, vision=VisionTower(config.vision), projector=Projector(config))

    def features(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        scales = self.vision(batch)
        # No others: FSDP2 gives an input that is not used a gradient of zeros.
        used = {name: scales[name] for name in self.projector.scales}
        return self.projector(used, batch)

    def whole_plan(self, ranks: int) -> dict[str, list[str]]:
        return tensor_plan(self.config, ranks)

    def branches(self) -> dict[str, list[str]]:
        branches: dict[str, list[str]] = {"vision": [], "projector": [], "text": []}
        for name, _ in self.named_parameters():
            part = name.partition(".")[0]
            branches[part if part in branches else "text"].append(name)
        return branches
