"""Files of one JSON object per line and report, which a resumed run goes on with."""

import json
import os
from pathlib import Path
from typing import TextIO


def open_until(path: Path, last_step: int) -> TextIO:
    """`path` for appending, without the records after `last_step` and without a torn last line."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line)
            except ValueError:  # the process died while writing it
                break
    # Beside it first: a process that dies here must not leave less than it found.
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(f"{line}\n" for line in kept))
    os.replace(beside, path)
    return path.open("a")
