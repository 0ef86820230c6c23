"""Reading from storage that may fail for a while.

What is a bad sample must follow from the sample alone, for ranks along tp and pp read the same
rows, each by itself, and a resumed run reads some again. An error of the disk or of the network in
front of it says nothing about the sample: it is waited for, and where it stays, it ends the run.
"""

import errno
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from titan_vlm.errors import DataError, ReadError

PAUSES_S = (0.1, 1.0, 5.0)
_NAMES = (
    *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EREMOTEIO", "ENOLINK"),
    *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "ENOTCONN", "ESHUTDOWN", "EPIPE"),
    *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET", "ENETUNREACH"),
)
PASSING = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}

T = TypeVar("T")


def passes(error: BaseException | None) -> bool:
    """Whether another try may go well."""
    return isinstance(error, OSError) and error.errno in PASSING


def patiently(read: Callable[[], T], what: str) -> T:
    """What `read` returns, tried again after pauses where the storage of `what` fails.

    Raises:
        ReadError: it fails every time.
    """
    for pause in (*PAUSES_S, None):
        try:
            return read()
        except OSError as error:
            if not passes(error):
                raise
            if pause is None:
                raise ReadError(
                    f"{what}: {error.strerror or error} ({1 + len(PAUSES_S)} tries in "
                    f"{sum(PAUSES_S):.0f} seconds); mend it, the same command goes on from "
                    "the newest checkpoint"
                ) from error
        time.sleep(pause)


def surely(read: Callable[[], T], path: str) -> T:
    """For a reader that says EIO of damaged files, too, as FFmpeg does: where it fails so, the file
    is read here, and if that goes well it is tried once more.

    Args:
        read: raises DataError from what it met.
    """
    try:
        return read()
    except DataError as error:
        if not passes(error.__cause__):
            raise
    try:
        patiently(partial(read_through, path), path)
    except OSError as error:
        if isinstance(error, ReadError):
            raise
        # Gone or forbidden by now: `read` says it.
    return read()


def read_through(path: str) -> None:
    with open(path, "rb") as file:
        while file.read(2**20):
            pass
