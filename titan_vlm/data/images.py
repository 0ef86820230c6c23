"""Image preparation, bit-identical to transformers' Qwen2VLImageProcessorPil for Qwen3-VL.

Two stages that need different things:

    size only     image_grid(width, height, spec)  -> (1, h, w) in patches     (packing)
    pixels        prepare_image(rgb, grid, spec)   -> float32 [h * w, C]       (row emission)

Transformers rescales in float64, rounds to float32, then normalises with mean and std 0.5 in
float32. All of that is a function of one byte, so here it is a table of 256 floats: the patches
are permuted as bytes and looked up once, several times faster and equal to the last bit.

Patch order: merge x merge blocks of neighbouring patches are consecutive, because the merger
joins consecutive patches. For an image of 4 x 4 patches and merge 2:

     0  1  4  5
     2  3  6  7
     8  9 12 13
    10 11 14 15

Shapes: `N` patches, `C` values of a patch = 3 colours x temporal x patch x patch.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from titan_vlm.data.config import Data
from titan_vlm.errors import DataError

MAX_ASPECT_RATIO = 200
MEAN = STD = 0.5


@dataclass(frozen=True)
class VisualSpec:
    """How pictures become patches and tokens: the model's geometry, the run's limits on pixels.

    square      all pictures become squares of one size, the largest that max_pixels allows
    tokens      visual tokens of a frame, where the model makes as many of any; 0: a token for each
                merge_size x merge_size patches
    positions   of visual tokens: "mrope", by their place in the picture, or "1d", as of text
    """

    min_pixels: int
    max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    video_fps: float = 2.0
    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    square: bool = False
    tokens: int = 0
    positions: str = "mrope"

    @property
    def factor(self) -> int:
        """Both sides of a prepared picture are multiples of this."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """C: the values of one patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def frame_tokens(self, grid: tuple[int, int, int]) -> tuple[int, int]:
        """(height, width) in tokens of a frame."""
        if self.tokens:
            return 1, self.tokens
        return grid[1] // self.merge_size, grid[2] // self.merge_size


def visual_spec(data: Data, **model: Any) -> VisualSpec:
    """The spec of a run: `data` is the `[data]` section, `model` what the model asks for."""
    limits = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels", "video_fps")
    return VisualSpec(**{name: getattr(data, name) for name in limits}, **model)


def smart_resize(width: int, height: int, spec: VisualSpec) -> tuple[int, int]:
    """(width, height) in multiples of `factor`, within the limits, of nearly the same shape."""
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_ASPECT_RATIO:
        raise DataError(
            f"image of {width} x {height}: aspect ratio {ratio:.0f}, at most {MAX_ASPECT_RATIO}"
        )
    factor = spec.factor
    if spec.square:
        side = max(factor, math.isqrt(spec.max_pixels) // factor * factor)
        return side, side
    new_w, new_h = round(width / factor) * factor, round(height / factor) * factor
    if new_h * new_w > spec.max_pixels:
        shrink = math.sqrt(height * width / spec.max_pixels)
        new_w = max(factor, math.floor(width / shrink / factor) * factor)
        new_h = max(factor, math.floor(height / shrink / factor) * factor)
    elif new_h * new_w < spec.min_pixels:
        grow = math.sqrt(spec.min_pixels / (height * width))
        new_w = math.ceil(width * grow / factor) * factor
        new_h = math.ceil(height * grow / factor) * factor
    return new_w, new_h


def image_grid(width: int, height: int, spec: VisualSpec) -> tuple[int, int, int]:
    """(t, h, w) in patches of an image of this size; no pixel is looked at."""
    new_w, new_h = smart_resize(width, height, spec)
    return 1, new_h // spec.patch_size, new_w // spec.patch_size


def prepare_image(image: Image.Image, grid: tuple[int, int, int], spec: VisualSpec) -> np.ndarray:
    """float32 [N, C] of an RGB image resized to `grid`; the frame is repeated over time."""
    size = (grid[2] * spec.patch_size, grid[1] * spec.patch_size)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    frames_THWC = np.asarray(image)[None]
    patches_NC1P = byte_patches(frames_THWC, 1, spec)
    values_NC1P = IMAGE_TABLE[patches_NC1P]
    repeated = np.repeat(values_NC1P, spec.temporal_patch_size, axis=2)
    return repeated.reshape(len(repeated), spec.patch_dim)


def byte_patches(frames_THWC: np.ndarray, temporal: int, spec: VisualSpec) -> np.ndarray:
    """uint8 [N, 3, temporal, patch * patch]: T frames cut into patches in the model's order."""
    p, m = spec.patch_size, spec.merge_size
    frames, height, width, colours = frames_THWC.shape
    cut = frames_THWC.reshape(
        frames // temporal, temporal, height // (p * m), m, p, width // (p * m), m, p, colours
    )
    # time, block row, block column, row and column within the block, colour, time in patch, y, x
    ordered = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return ordered.reshape(-1, colours, temporal, p * p)


def _image_table() -> np.ndarray:
    """Byte -> float32 value, with transformers' roundings for images (PIL backend)."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(MEAN)) / np.float32(STD)


IMAGE_TABLE = _image_table()
