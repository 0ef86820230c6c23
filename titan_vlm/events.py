"""What happened to a run, one line each: `events.jsonl` in its directory.

    {"time": "2026-01-31T12:00:00.000+00:00", "step": 120, "kind": "save", "seconds": 3.1, ...}

    kind        further fields             said when
    start       mesh, ranks, host, pid     a process of this run begins
    restart     count                      and torchrun had to start it again
    resume      mesh, ranks_saved          training goes on from a checkpoint of this step
    anew        kept_in                    a run that has saved finds no checkpoint, and begins
                                           at step 0; what it had written is in this folder
    stage       stage, number              a stage of the curriculum begins after this step
    save        seconds, bytes             this step was saved
    signal      signal                     the ranks have agreed to stop for it
    stop        reason, signal or error    it ended: finished, signal, max_hours, error or, before
                                           it began, refused; with saved = false by a second signal
    source_end  source                     this source of a mixture is read to its end
    skip, spike, rollback, failed_save, damaged      by checkpoint and guards

Rank 0 writes, the others' calls do nothing, and so do those outside a run. The file is only ever
appended to: a run that goes back to an older step has its detours in it.
"""

import json
import logging
import os
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger("titan_vlm")
NAME = "events.jsonl"
_lock = threading.Lock()  # checkpoints, signals and hangs have threads
_file: TextIO | None = None


def open_for(directory: str | Path) -> None:
    """From now on `write` appends to `directory`/events.jsonl.

    Raises:
        OSError: it cannot be written.
    """
    global _file
    close()
    path = Path(directory) / NAME
    _file = path.open("a")
    if path.stat().st_size:
        with path.open("rb") as before:
            before.seek(-1, os.SEEK_END)
            if before.read() != b"\n":  # killed while writing: begin another line
                _file.write("\n")


def write(kind: str, step: int | None = None, **fields: Any) -> None:
    """Say that something happened. A full disk is a warning: it must not end the run."""
    record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "step": step}
    line = json.dumps(record | {"kind": kind} | fields, default=str)
    with _lock:
        if _file is not None:
            try:
                _file.write(line + "\n")
                _file.flush()
            except OSError as error:
                logger.warning("%s: %s", NAME, error.strerror)


def close() -> None:
    """From now on `write` does nothing."""
    global _file
    with _lock:
        if _file is not None:
            with suppress(OSError):  # what it could not write was said then
                _file.close()
        _file = None


def read(directory: str | Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; none where there is no file. Lines that a killed process
    left half written are skipped."""
    path = Path(directory) / NAME
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            found.append(event)
    return found
