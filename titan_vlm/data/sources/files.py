"""Files of a source: which they are, and lines of JSONL read at random without holding them.

A line is found by its byte offset (8 bytes per line in memory, made by one pass over the file)
and read by opening the file again: a source has more shards than a process may hold open.
"""

import glob
import json
import os
from array import array
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from titan_vlm.errors import ConfigError, DataError

# Before a record; some editors begin a file with a byte order mark.
BLANK = b"\xef\xbb\xbf \t\r\n"


def find_files(path: str, suffixes: tuple[str, ...], kind: str) -> list[str]:
    """The files that data.path names: one file, all of a directory, or a glob; sorted."""
    if not path:
        raise ConfigError(f'data.path: the source "{kind}" needs a file, directory or glob')
    if os.path.isdir(path):
        files = [str(p) for p in Path(path).iterdir() if p.name.endswith(suffixes)]
    else:
        files = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    if not files:
        raise ConfigError(f"data.path: {path}: no such file, or no {' or '.join(suffixes)} in it")
    return sorted(files)


def read_slice(path: str, offset: int, length: int) -> bytes:
    """`length` bytes of a file from `offset` on."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


class JsonlFile:
    """Records of one JSONL file by number; blank lines are skipped.

    Raises:
        ConfigError: the file is one JSON array.
    """

    def __init__(self, path: str):
        self.path = path
        self.starts, self.lengths, self.lines = array("Q"), array("Q"), array("Q")
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not self.lines and line.lstrip(BLANK).startswith(b"["):
                    raise ConfigError(
                        f"data.path: {path} is one JSON array; write one object per line "
                        f"(jq -c '.[]' {path})"
                    )
                if not line.isspace():
                    self.starts.append(offset)
                    self.lengths.append(len(line))
                    self.lines.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def origin(self, index: int) -> str:
        return f"{self.path}:{self.lines[index]}"

    def record(self, index: int) -> dict:
        line = read_slice(self.path, self.starts[index], self.lengths[index])
        try:
            record = json.loads(line)
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
