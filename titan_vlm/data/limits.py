"""What one sample may cost, and where its pictures may lie: data is not trusted, settings are.

Each limit is asked before the work it bounds: the pixels of a picture before they are decoded, the
bytes of a line, file, member or answer before they are read, turns and text before the chat
template sees them (it renders a conversation once per turn, so its cost is their product).
What exceeds a limit is one bad sample with a reason that names the setting.
"""

import os
import stat
from dataclasses import dataclass, fields
from functools import lru_cache

from titan_vlm.data.config import Data
from titan_vlm.errors import DataError


@dataclass(frozen=True)
class Limits:
    """The settings of `[data]` of the same names, where they are documented."""

    max_image_pixels: int
    max_sample_bytes: int
    max_sample_chars: int
    max_sample_parts: int
    allow_outside: bool
    allow_remote: bool
    remote_timeout_s: float

    def check_bytes(self, count: int, what: str) -> None:
        self._check("max_sample_bytes", count, f"{what} of {count} bytes")

    def check_chars(self, count: int) -> None:
        self._check("max_sample_chars", count, f"text of {count} characters")

    def check_parts(self, count: int) -> None:
        self._check("max_sample_parts", count, f"{count} turns, texts and pictures")

    def check_pixels(self, width: int, height: int) -> None:
        if min(width, height) <= 0:
            raise DataError(f"{width} x {height}: no pixels")
        self._check("max_image_pixels", width * height, f"{width} x {height} pixels")

    def _check(self, name: str, count: int, found: str) -> None:
        if count > getattr(self, name):
            raise DataError(f"{found}, at most data.{name} = {getattr(self, name)}")

    def check_file(self, path: str) -> None:
        """A regular file of bounded size: a pipe or a device could be read for ever."""
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise DataError("no regular file")
        self.check_bytes(found.st_size, "a file")

    def check_place(self, path: str, root: str) -> None:
        """Within the folder `root` ("" is the current one), links followed."""
        if self.allow_outside:
            return
        folder = real_folder(root)
        try:
            real = os.path.realpath(path)
        except (OSError, ValueError) as error:  # a NUL, a name of any length
            raise DataError(f"{path:.200}: no usable path: {error}") from error
        if not real.startswith(folder):
            raise DataError(
                f"{path:.200}: lies outside of {folder}; move it there, set data.image_root to "
                "a folder that holds it, or data.allow_outside = true"
            )


def limits(data: Data) -> Limits:
    """Those of a run."""
    return Limits(**{field.name: getattr(data, field.name) for field in fields(Limits)})


DEFAULT = limits(Data())


@lru_cache
def real_folder(root: str) -> str:
    """With links followed and a separator at the end."""
    return os.path.join(os.path.realpath(root or "."), "")
