"""Files of one JSON object per line and report, which a resumed run goes on with."""

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger("titan_vlm")


class Lines:
    """Appends records to `path`. A full disk is a warning: what it does not take waits here until
    it does, in order and without a torn line."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, record: dict[str, Any]) -> None:
        self._waiting += (json.dumps(record) + "\n").encode()
        self._send()

    def sync(self) -> None:
        """Also on the disk, where the machine and not the process alone may stop."""
        self._send()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("%s: %s", self.path, error.strerror)

    def close(self) -> None:
        self._send()
        self._file.close()

    def _send(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            logger.warning("%s: %s; %d bytes wait", self.path, error.strerror, len(self._waiting))


def open_until(path: Path, last_step: int) -> Lines:
    """`path` for appending, without the records after `last_step` and without torn lines."""
    kept = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line)
            except (ValueError, TypeError, KeyError):  # the process died while writing it
                continue
    # Beside it first: a process that dies here must not leave less than it found.
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(f"{line}\n" for line in kept))
    os.replace(beside, path)
    return Lines(path)
