"""The section [projector]: how the scales of a vision tower become what a decoder reads.

Nothing here imports torch: a mistake is reported before anything is launched.
"""

from dataclasses import dataclass
from typing import Literal

from titan_vlm.settings import setting


@dataclass(frozen=True)
class Projector:
    """From the vision tower's scales to features of the text width."""

    reduction: Literal["none", "merge", "resampler", "qformer"] = setting(
        "merge",
        "What becomes of the patches of a picture: all stay; 2 x 2 neighbours become one; or "
        "projector.tokens learned queries look at them (Perceiver resampler, BLIP-2's Q-Former).",
    )
    tokens: int = setting(
        64, "Visual tokens of a picture (reduction resampler or qformer).", at_least=1
    )
    layers: int = setting(2, "Layers of the resampler or Q-Former.", at_least=1)
    levels: list[str] = setting(
        [],
        'Scales that are added behind decoder layers, as "scale:layer": a block of the vision '
        "tower by its index, final, or pooled (a summary, added to all tokens of its picture), as "
        'in ["2:0", "5:1", "pooled:2"]. Several may go to one layer. The final scale always '
        "stands in for the embeddings of the visual tokens.",
    )
    depth: int = setting(-1, "How many of projector.levels are in use; -1: all.", at_least=-1)
    positions: Literal["mrope", "1d"] = setting(
        "mrope", "Of visual tokens: time, height and width, interleaved; or one behind another."
    )


def is_pooled(level: str) -> bool:
    """Whether a level, as `projector.levels` writes it, is a summary of each picture."""
    return level.partition(":")[0] == "pooled"
