"""What a source hands out: messages in OpenAI form, and references to pictures not yet opened.

    RawSample(
        id="train.jsonl:17",
        origin="train.jsonl:17",                  # what a log line names
        messages=[
            {"role": "user", "content": [
                {"type": "image", "image": ImageRef("cat.jpg", partial(open_file, "cat.jpg"))},
                {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
        meta={"kind": "which", "answer": "A cat."})

Packing needs only the size of a picture, which its header tells; pixels are decoded when a row
is emitted. So a reference is a callable that opens the image lazily (PIL reads only the header
until pixels are asked for), and everything here can be pickled into a worker process.
"""

import errno
import io
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image, ImageOps

from titan_vlm.errors import DataError

ORIENTATION_TAG = 0x0112  # EXIF
TURNED = (5, 6, 7, 8)  # its values that swap width and height


@dataclass
class ImageRef:
    """One picture: `open` returns a PIL image; `size` is (width, height) where already known."""

    name: str
    open: Callable[[], Image.Image]
    size: tuple[int, int] | None = None

    def header_size(self) -> tuple[int, int]:
        """(width, height) as displayed, without decoding pixels."""
        if self.size is None:
            try:
                with self.open() as image:
                    width, height = image.size
                    # Pillow has turned the size of a TIFF itself.
                    turned = image.format not in (None, "TIFF") and (
                        image.getexif().get(ORIENTATION_TAG) in TURNED
                    )
            except Exception as error:  # image decoders raise nearly every type there is
                raise_machine_trouble(error)
                raise DataError(f"{self.name}: cannot be read as an image: {error}") from error
            self.size = (height, width) if turned else (width, height)
        return self.size

    def load_rgb(self) -> Image.Image:
        """Decoded, upright, in RGB with transparency over white (as transformers does it)."""
        try:
            image = self.open()
            image.load()
            if image.format is not None:  # from a file: cameras store pictures turned
                image = ImageOps.exif_transpose(image)
            return to_rgb(image)
        except Exception as error:  # image decoders raise nearly every type there is
            raise_machine_trouble(error)
            raise DataError(f"{self.name}: broken image: {error}") from error


@dataclass
class VideoRef:
    """One video: frames given as pictures with their rate, or a file that PyAV decodes."""

    name: str
    frames: list[ImageRef] = field(default_factory=list)
    fps: float | None = None
    path: str = ""


@dataclass
class RawSample:
    """One conversation, not yet tokenized."""

    id: str
    messages: list[dict]
    origin: str
    meta: dict = field(default_factory=dict)


def raise_machine_trouble(error: Exception) -> None:
    """Raise what is no fault of the sample: out of memory or of file descriptors."""
    machine = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in machine:
        raise error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, transparency composited over white."""
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_file(path: str) -> Image.Image:
    return Image.open(path)


def open_bytes(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def open_slice(path: str, offset: int, length: int) -> Image.Image:
    """An image that is `length` bytes of a larger file (a member of a tar shard)."""
    with open(path, "rb") as file:
        file.seek(offset)
        return Image.open(io.BytesIO(file.read(length)))


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def image_part(ref: ImageRef) -> dict:
    return {"type": "image", "image": ref}


def video_part(ref: VideoRef) -> dict:
    return {"type": "video", "video": ref}
