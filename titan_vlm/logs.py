"""The log file of a rank, `logs/rank<r>.log`: what logging says there, warnings, and exceptions
that nobody caught. torchrun shows the output of rank 0 alone; what others said is in here.
"""

import logging
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A full disk: the console has what this file lacks, without a traceback for each line."""


_handler: _File | None = None
_undo: list[Callable[[], None]] = []


def begin(path: Path, is_shown: bool) -> None:
    """Append to `path` until `end`, from level INFO; the console has that of shown ranks only.

    Raises:
        OSError: `path` cannot be written.
    """
    global _handler
    end()
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(format="%(levelname)s %(message)s")
        root.handlers[0].setLevel(logging.INFO if is_shown else logging.WARNING)
    _handler = _File(path, encoding="utf-8")
    _handler.setFormatter(logging.Formatter(_FORMAT))
    root.addHandler(_handler)
    level, show, hook = root.level, warnings.showwarning, threading.excepthook
    root.setLevel(logging.INFO)

    def show_and_write(message, category, filename, lineno, file=None, line=None):
        write(logging.WARNING, f"{filename}:{lineno}: {category.__name__}: {message}")
        show(message, category, filename, lineno, file, line)

    def hook_and_write(args):
        exception = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
        write(logging.ERROR, f"in thread {args.thread and args.thread.name}: {''.join(exception)}")
        hook(args)

    warnings.showwarning, threading.excepthook = show_and_write, hook_and_write

    def undo():
        root.setLevel(level)
        warnings.showwarning, threading.excepthook = show, hook

    _undo.append(undo)


def write(level: int, text: str) -> None:
    """Into the file only."""
    if _handler is not None:
        _handler.handle(logging.LogRecord("titan_vlm", level, "", 0, text, None, None))


def end() -> None:
    """Close the file, and leave logging and warnings as they were."""
    global _handler
    if _handler is not None:
        logging.getLogger().removeHandler(_handler)
        with suppress(OSError):  # a full disk
            _handler.close()
        _undo.pop()()
    _handler = None
