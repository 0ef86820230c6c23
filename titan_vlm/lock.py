"""One run at a time in a directory: rank 0 has a lock (flock) on its file `.lock`.

The system takes the lock from a process that is gone; from one on a machine that is lost, a network
file system after its lease (NFS: 90 s), and a restart waits for that.
"""

import errno
import fcntl
import logging
import os
import platform
import time
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from titan_vlm import launched
from titan_vlm.errors import ConfigError

logger = logging.getLogger("titan_vlm")
WAIT_S = 20.0  # for a process that was told to end and is saving
RESTART_WAIT_S = 120.0
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_held: list[TextIO] = []


def take(folder: Path, key: str) -> None:
    """Make the folder that the setting `key` names, and have it for this run until `release`.

    Where the file system knows no locks, that is a warning.

    Raises:
        ConfigError: another run has it, or it cannot be written.
    """
    if dist.get_rank() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"{key} = {folder}: {error.strerror}") from error
    _held.append(file)
    end = time.monotonic() + (RESTART_WAIT_S if launched.is_restart() else WAIT_S)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            file.seek(0)
            raise ConfigError(
                f"{key} = {folder}: {file.read().strip()} is still training here; stop it, or use "
                "another directory"
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise ConfigError(f"{key} = {folder}/.lock: {error.strerror}") from error
            logger.warning(
                "%s = %s cannot be locked (%s): see to it that no other run uses it",
                *(key, folder, error.strerror),
            )
            return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()


def release() -> None:
    """Let others have what was taken."""
    while _held:
        _held.pop().close()


# A fork has the lock too, and a data worker may outlive its rank while it reads from a slow disk.
os.register_at_fork(after_in_child=release)
