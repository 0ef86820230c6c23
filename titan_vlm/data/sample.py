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

Whatever a file is called, its content says what it is, and only the formats below are opened:
Pillow knows others that start a program (EPS) or have no white (raw numbers).
"""

import errno
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps

from titan_vlm.data.limits import DEFAULT, Limits
from titan_vlm.data.reading import patiently
from titan_vlm.data.remote import fetch
from titan_vlm.errors import DataError, ReadError

ORIENTATION_TAG = 0x0112  # EXIF
TURNED = (5, 6, 7, 8)  # its values that swap width and height
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# A progressive JPEG is decoded as a whole for each of its scans, which may be a few bytes long.
MAX_JPEG_SCANS = 100


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
                self.size = patiently(self._read_size, self.name)
            except Exception as error:  # image decoders raise nearly every type there is
                raise_machine_trouble(error)
                raise DataError(f"{self.name}: cannot be read as an image: {error}") from error
        return self.size

    def _read_size(self) -> tuple[int, int]:
        with self.open() as image:
            width, height = image.size
            if min(width, height) <= 0:
                raise DataError(f"{width} x {height}: no pixels")
            # Pillow has turned the size of a TIFF itself.
            turned = image.format not in (None, "TIFF") and (
                image.getexif().get(ORIENTATION_TAG) in TURNED
            )
        return (height, width) if turned else (width, height)

    def load_rgb(self) -> Image.Image:
        """Decoded, upright, in RGB with transparency over white (as transformers does it)."""
        try:
            return patiently(self._load, self.name)
        except Exception as error:  # image decoders raise nearly every type there is
            raise_machine_trouble(error)
            raise DataError(f"{self.name}: broken image: {error}") from error

    def _load(self) -> Image.Image:
        image = self.open()
        if image.format in ("JPEG", "MPO") and image.fp is not None:  # None: decoded already
            check_scans(image)
        image.load()
        if image.format is not None:  # from a file: cameras store pictures turned
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)


@dataclass
class VideoRef:
    """One video: frames given as pictures with their rate, or a file that PyAV decodes."""

    name: str
    frames: list[ImageRef] = field(default_factory=list)
    fps: float | None = None
    path: str = ""
    limits: Limits = DEFAULT


@dataclass
class RawSample:
    """One conversation, not yet tokenized."""

    id: str
    messages: list[dict]
    origin: str
    meta: dict = field(default_factory=dict)


def raise_machine_trouble(error: Exception) -> None:
    """Raise what is no fault of the sample: out of memory or of file descriptors, or storage that
    fails."""
    machine = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    if isinstance(error, MemoryError | ReadError) or getattr(error, "errno", None) in machine:
        raise error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, transparency composited over white; of 16-bit grey the high byte.

    The high byte is also what Pillow takes of 16-bit colours; its conversion of 16-bit grey calls
    white whatever exceeds 255.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError("32-bit grey has no agreed white; store it with 8 or 16 bits")
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def check_scans(image: Image.Image) -> None:
    """Counts start-of-scan markers; within a scan, a byte 255 is always followed by 0."""
    file = image.fp
    place, scans, last = file.tell(), 0, b""
    file.seek(0)
    while chunk := file.read(2**20):
        scans += (last + chunk).count(b"\xff\xda")
        last = chunk[-1:]
    file.seek(place)
    if scans > MAX_JPEG_SCANS:
        raise DataError(f"a JPEG of {scans} scans, at most {MAX_JPEG_SCANS}")


def open_file(path: str, limits: Limits = DEFAULT) -> Image.Image:
    limits.check_file(path)
    return _open(path, limits)


def open_bytes(data: bytes, limits: Limits = DEFAULT) -> Image.Image:
    limits.check_bytes(len(data), "a picture")
    return _open(io.BytesIO(data), limits)


def open_slice(path: str, offset: int, length: int, limits: Limits = DEFAULT) -> Image.Image:
    """An image that is `length` bytes of a larger file (a member of a tar shard)."""
    limits.check_bytes(length, "a picture")
    with open(path, "rb") as file:
        file.seek(offset)
        return _open(io.BytesIO(file.read(length)), limits)


def open_remote(url: str, limits: Limits = DEFAULT) -> Image.Image:
    """An image fetched now; `data.allow_remote` has been asked."""
    data = fetch(url, limits.max_sample_bytes, limits.remote_timeout_s)
    return _open(io.BytesIO(data), limits)


def _open(file: str | io.BytesIO, limits: Limits) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow's own limit has a warning at half of it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=known_formats())
    except Image.DecompressionBombError as error:
        raise DataError(
            f"more pixels than data.max_image_pixels = {limits.max_image_pixels}"
        ) from error
    try:
        limits.check_pixels(*image.size)
    except DataError:
        image.close()
        raise
    return image


@lru_cache
def known_formats() -> list[str]:
    """Those that this build of Pillow can open."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def image_part(ref: ImageRef) -> dict:
    return {"type": "image", "image": ref}


def video_part(ref: VideoRef) -> dict:
    return {"type": "video", "video": ref}
