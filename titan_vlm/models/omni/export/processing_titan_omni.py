"""From messages with pictures to what OmniMoE reads; pictures bit for bit as in training.

    text       <|vision_start|><|image_pad|><|vision_end|>Which?
    input_ids  the same, the placeholder once per visual token of the picture
    pixels     resized (bicubic), each byte looked up in a table of 256 float32 values, patches cut;
               merge x merge neighbours behind one another

Shapes: N patches, C values of a patch = 3 colours x temporal x patch x patch, I pictures.
"""

import math
import os

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin

MAX_ASPECT_RATIO = 200
# Rescaled in float64, rounded, then normalised with mean and deviation 0.5 in float32.
TABLE = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


class TitanOmniProcessor(ProcessorMixin):
    """
    Args:
        min_pixels, max_pixels: of a resized picture.
        square: all pictures become squares of one size, the largest that `max_pixels` allows.
        frame_tokens: visual tokens of a picture; 0: one for each merge_size x merge_size patches.
    """

    def __init__(
        self,
        tokenizer=None,
        patch_size=16,
        merge_size=2,
        temporal_patch_size=1,
        min_pixels=0,
        max_pixels=0,
        square=False,
        frame_tokens=0,
        image_pad="<|image_pad|>",
        video_pad="<|video_pad|>",
        chat_template=None,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.patch_size, self.merge_size = patch_size, merge_size
        self.temporal_patch_size = temporal_patch_size
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.square, self.frame_tokens = square, frame_tokens
        self.image_pad, self.video_pad = image_pad, video_pad

    @property
    def model_input_names(self):
        return [*self.tokenizer.model_input_names, "pixel_values", "image_grid_thw"]

    def __call__(self, images=None, text=None, videos=None, **kwargs) -> BatchFeature:
        """`input_ids` and `attention_mask`; with pictures `pixel_values` [N, C] and
        `image_grid_thw` [I, 3].

        Args:
            images: PIL images or paths of files, one, a list, or lists in a list, in the order in
                which the texts place them.
            text: one or several.
            kwargs: of the tokenizer.
        """
        if text is None:
            raise ValueError(f"text: expected one that places the pictures ({self.image_pad})")
        images = list(_flat(images))
        texts = [text] if isinstance(text, str) else list(text)
        if videos or any(self.video_pad in text for text in texts):
            raise ValueError("videos: give their frames as pictures; this processor cuts no video")
        tensors = kwargs.pop("return_tensors", None)
        kwargs = kwargs.pop("text_kwargs", {}) | kwargs | {"add_special_tokens": False}
        placed = sum(text.count(self.image_pad) for text in texts)
        if placed != len(images):
            raise ValueError(
                f"the texts place {placed} pictures ({self.image_pad}), got {len(images)}"
            )
        prepared = [self.prepare(image) for image in images]
        grids = iter([grid for _, grid in prepared])
        texts = [self._expand(text, grids) for text in texts]
        data = dict(self.tokenizer(texts, **kwargs))
        if prepared:
            data["pixel_values"] = torch.from_numpy(np.concatenate([x for x, _ in prepared]))
            data["image_grid_thw"] = torch.tensor([grid for _, grid in prepared])
        return BatchFeature(data, tensor_type=tensors)

    def _expand(self, text: str, grids) -> str:
        """With each placeholder as often as its picture has visual tokens."""
        first, *rest = text.split(self.image_pad)
        for part in rest:
            _, height, width = next(grids)
            tokens = self.frame_tokens or height * width // self.merge_size**2
            first += self.image_pad * tokens + part
        return first

    # ------------------------------------------------------------------------------- pictures

    def prepare(self, image) -> tuple[np.ndarray, tuple[int, int, int]]:
        """float32 [N, C] and (1, height, width) in patches."""
        image = to_rgb(image)
        size = self.smart_resize(*image.size)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        p, m = self.patch_size, self.merge_size
        width, height = size
        bytes_ = np.asarray(image).reshape(height // (p * m), m, p, width // (p * m), m, p, 3)
        # block row, block column, row and column within the block, colour, y, x
        ordered = bytes_.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, p * p)
        patches = np.repeat(TABLE[ordered], self.temporal_patch_size, axis=2)
        return patches.reshape(len(patches), -1), (1, height // p, width // p)

    def smart_resize(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in multiples of patch x merge, within the limits, of nearly the same
        shape."""
        if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
            raise ValueError(f"a picture of {width} x {height}: longer than 1:{MAX_ASPECT_RATIO}")
        factor = self.patch_size * self.merge_size
        if self.square:
            side = max(factor, math.isqrt(self.max_pixels) // factor * factor)
            return side, side
        new_w, new_h = round(width / factor) * factor, round(height / factor) * factor
        if new_h * new_w > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            new_w = max(factor, math.floor(width / shrink / factor) * factor)
            new_h = max(factor, math.floor(height / shrink / factor) * factor)
        elif new_h * new_w < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            new_w = math.ceil(width * grow / factor) * factor
            new_h = math.ceil(height * grow / factor) * factor
        return new_w, new_h


def _flat(images):
    """One picture, or lists of them to any depth, one after another."""
    if images is None:
        return
    if isinstance(images, (list, tuple)):
        for part in images:
            yield from _flat(part)
    else:
        yield images


def to_rgb(image) -> Image.Image:
    """Upright, in RGB, transparency over white; of 16-bit grey the high byte."""
    if isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            raise ValueError(f"{str(image)[:80]}: no such file; open pictures from elsewhere first")
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"a picture must be a PIL image or a path, got {type(image).__name__}")
    if image.format is not None:  # from a file: cameras store pictures turned
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit grey has no agreed white; store it with 8 or 16 bits")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")
