"""Files of a source: which they are, and lines of JSONL read at random without holding them.

A line is found by its byte offset (8 bytes per line in memory, made by one pass over the file)
and read by opening the file again: a source has more shards than a process may hold open.
"""

import glob
import json
import os
from array import array
from bisect import bisect_right
from functools import partial
from itertools import accumulate
from pathlib import Path

from titan_vlm.data.limits import DEFAULT, Limits
from titan_vlm.data.reading import patiently
from titan_vlm.errors import ConfigError, DataError

# Before a record; some editors begin a file with a byte order mark.
BLANK = b"\xef\xbb\xbf \t\r\n"
PIECE = 2**20  # of a line, when lines are looked for


def find_files(path: str, suffixes: tuple[str, ...], kind: str) -> list[str]:
    """The files that data.path names: one file, all of a directory, or a glob; sorted."""
    if not path:
        raise ConfigError(f'data.path: the source "{kind}" needs a file, directory or glob')
    if os.path.isdir(path):
        files = [str(p) for p in Path(path).iterdir() if p.name.endswith(suffixes)]
    else:
        files = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    files = [file for file in files if os.path.isfile(file)]  # a pipe could be read for ever
    if not files:
        raise ConfigError(f"data.path: {path}: no such file, or no {' or '.join(suffixes)} in it")
    for file in files:
        if not os.access(file, os.R_OK):
            raise ConfigError(f"data.path: {file}: no permission to read it")
    return sorted(files)


def read_slice(path: str, offset: int, length: int) -> bytes:
    """`length` bytes of a file from `offset` on.

    Raises:
        ReadError: storage fails, though it was tried again.
    """

    def read() -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    return patiently(read, path)


class JsonlFile:
    """Records of one JSONL file by number; blank lines are skipped.

    Raises:
        ConfigError: the file is one JSON array.
    """

    def __init__(self, path: str, limits: Limits = DEFAULT):
        self.path, self.limits = path, limits
        self.starts, self.lengths, self.lines = array("Q"), array("Q"), array("Q")
        start = offset = 0
        number, blank = 1, True
        with open(path, "rb") as file:
            # Piece by piece: a line may be longer than memory.
            for piece in iter(partial(file.readline, PIECE), b""):
                if not self.lines and blank and piece.lstrip(BLANK).startswith(b"["):
                    raise ConfigError(
                        f"data.path: {path} is one JSON array; write one object per line "
                        f"(jq -c '.[]' {path})"
                    )
                blank = blank and piece.isspace()
                offset += len(piece)
                if piece.endswith(b"\n"):
                    self._add(start, offset, number, blank)
                    start, number, blank = offset, number + 1, True
        self._add(start, offset, number, blank)

    def _add(self, start: int, end: int, number: int, blank: bool) -> None:
        if not blank:
            self.starts.append(start)
            self.lengths.append(end - start)
            self.lines.append(number)

    def __len__(self) -> int:
        return len(self.starts)

    def origin(self, index: int) -> str:
        return f"{self.path}:{self.lines[index]}"

    def record(self, index: int) -> dict:
        try:
            self.limits.check_bytes(self.lengths[index], "a line")
            record = json.loads(read_slice(self.path, self.starts[index], self.lengths[index]))
        except DataError as error:
            raise DataError(f"{self.origin(index)}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.origin(index)}: malformed JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{self.origin(index)}: expected a JSON object, got {type(record).__name__}"
            )
        return record


class Concatenated:
    """Several indexed files as one sequence: number -> (file, number within it)."""

    def __init__(self, files: list):
        self.files = files
        self.ends = list(accumulate(map(len, files)))

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, index: int) -> tuple:
        k = bisect_right(self.ends, index)
        return self.files[k], index - (self.ends[k - 1] if k else 0)
