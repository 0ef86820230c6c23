"""What the tests of hostile input share."""

import io
import struct
import time
import tracemalloc
import zlib
from contextlib import contextmanager
from functools import partial

import numpy as np
from PIL import Image

from titan_vlm.data.config import Data
from titan_vlm.data.images import VisualSpec
from titan_vlm.data.limits import limits
from titan_vlm.data.sample import ImageRef, open_bytes

SPEC = VisualSpec(1024, 65536, 1024, 65536)


@contextmanager
def bounds(seconds: float, megabytes: float):
    """Of CPU time and of memory that Python allocates."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        took, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < seconds and peak < megabytes * 2**20


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width=37, height=23, channels=3) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(0))
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def ref(data: bytes, **options) -> ImageRef:
    return ImageRef("a.png", partial(open_bytes, data, limits(Data(**options))))


def raw_png(width, height, data=b"", depth=8, colour=0, before=()) -> bytes:
    """A PNG chunk by chunk; `colour` 0 is grey, 2 RGB."""

    def chunk(kind, body):
        whole = kind + body
        return struct.pack(">I", len(body)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), *before, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def ask(where, kind="image"):
    content = [{"type": kind, kind: where}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "Red."}]
