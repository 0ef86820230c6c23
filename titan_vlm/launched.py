"""What the launcher and the trainers it starts tell each other, in a folder of small files.

    scripts/launch.py                              trainers of this node, local rank 0, 1, ...

    makes the folder, names it to them      ->     write `rank<r>`: process id, "running"
                                                   write `begun` once all is set up, for those that
                                                   are started in their place
    SIGTERM: writes `signal`, passes it on  ->     finish the step, save
                                            <-     write `rank<r>`: "stopped"
    exits with STOPPED (75)                        exit with 0

A trainer that was started so leaves 75 to the launcher: to torchrun every status but 0 is a
failure, for which it ends the other ranks, still saving, and with --max-restarts starts all again.
Nor is the signal left to torchrun: it passes none but SIGTERM, SIGINT, SIGHUP and SIGQUIT on, to
data workers too, kills after 30 seconds, and lets its peers on other nodes wait for it.
"""

import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on where this one ended
REPEAT_S = 1.0  # a signal may come twice: from the launcher, and from who signalled all processes
PR_SET_PDEATHSIG = 1  # of prctl(2)
# Environment variables.
FOLDER, BEGAN, LAUNCHER = "TITAN_LAUNCH_FOLDER", "TITAN_LAUNCH_TIME", "TITAN_LAUNCH_PID"


# ---------------------------------------------------------------------------- in a trainer


def began() -> float:
    """When the launcher started, or else now: seconds since the epoch."""
    return float(os.environ.get(BEGAN, time.time()))


def end_with_launcher() -> None:
    """Have the system send SIGTERM here when the launcher is gone, even by SIGKILL: a run without
    one must not train on beside its successor. (Linux; elsewhere the lock on the directory holds.)
    """
    if _folder() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != int(os.environ[LAUNCHER]):  # gone before, while this one imported
            os.kill(os.getpid(), signal.SIGTERM)


def begin() -> int:
    """Tell the launcher that this process takes signals from now on.

    Returns:
        The signal that the launcher got before, else 0: it started this process all the same, in
        place of one that failed.
    """
    _tell("running")
    sent = _folder() / "signal" if _folder() else None
    return int(sent.read_text()) if sent and sent.exists() else 0


def end(stopped: bool) -> int:
    """Tell the launcher how this process ended; its exit status."""
    _tell("stopped" if stopped else "ended")
    return STOPPED if stopped and not _folder() else 0


def set_up() -> None:
    """Leave for those started in its place that this process was refused nothing and trains."""
    if folder := _folder():
        (folder / "begun").touch()


def is_restart() -> bool:
    """Whether a process that was `set_up` has been here before, and torchrun or SLURM has started
    the command again by themselves. Nodes may differ: one may have joined since."""
    folder, again = _folder(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return requeued or ((folder / "begun").exists() if folder else again)


def has_failed_peer() -> bool:
    """Whether a trainer of this node is gone and has not told its end: then a SIGTERM is
    torchrun's, which ends the others."""
    folder = _folder()
    running = [w["pid"] for w in (_told(folder) if folder else []) if w["state"] == "running"]
    return not all(map(_is_there, running))


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _folder() -> Path | None:
    folder = os.environ.get(FOLDER)
    return Path(folder) if folder and os.path.isdir(folder) else None


def _tell(state: str) -> None:
    if folder := _folder():
        local_rank, of = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE", "1")
        file = folder / f"rank{local_rank}"
        _write(file, json.dumps({"pid": os.getpid(), "of": int(of), "state": state}))


def _write(file: Path, text: str) -> None:
    """In one go: nobody reads half a file."""
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(text)
    temporary.rename(file)


def _told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank*"))]


# ---------------------------------------------------------------------------- in the launcher


class Workers:
    """`with Workers(grace_s) as workers:` around torchrun, in the main thread.

    The first SIGTERM, SIGUSR1, SIGINT or SIGHUP is passed on to the trainers, which then end by
    themselves. A second one, or `grace_s` seconds, raises torchrun's own SignalException, and
    torchrun ends them. So does the first where not all of them have begun. A signal that this
    process was told to ignore (nohup, a shell's background) stays ignored.

    Afterwards `stopped` is whether nothing is lost and more is to be done: all trainers have saved
    and ended before their last step, or a signal came before any had begun.
    """

    def __init__(self, grace_s: int):
        self.grace_s = grace_s
        self.signal = 0  # the first
        self.stopped = False
        self._at = 0.0
        self._temporary = tempfile.TemporaryDirectory(prefix="titan_vlm_")
        self._folder = Path(self._temporary.name)

    def __enter__(self) -> "Workers":
        os.environ |= {FOLDER: str(self._folder), BEGAN: str(time.time())}
        os.environ[LAUNCHER] = str(os.getpid())  # torchrun's main runs here and starts trainers
        for number in _signals():
            signal.signal(number, self._receive)
        signal.signal(signal.SIGALRM, lambda *_: self._give_up())
        return self

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        states = [worker["state"] for worker in _told(self._folder)]
        self.stopped = all(s == "stopped" for s in states) and bool(states or self.signal)
        for number in _signals():  # late ones, of who ends all tasks when the first has ended
            signal.signal(number, signal.SIG_IGN)
        self._temporary.cleanup()

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signal and time.monotonic() - self._at < REPEAT_S:
            return
        again = bool(self.signal)
        self.signal, self._at = self.signal or number, time.monotonic()
        workers = _told(self._folder)
        running = [worker["pid"] for worker in workers if worker["state"] == "running"]
        # One that is gone has failed, and its successor has not begun.
        begun = workers and len(workers) >= workers[0]["of"] and all(map(_is_there, running))
        if again or not begun:
            self._give_up()
        _write(self._folder / "signal", str(int(_passed_on(number))))
        for pid in running:
            with suppress(ProcessLookupError):  # it has just ended, and torchrun will notice
                os.kill(pid, _passed_on(number))
        signal.alarm(self.grace_s)

    def _give_up(self) -> None:
        raise SignalException("the launcher got a signal", signal.SIGTERM)


def _signals() -> list[int]:
    ours = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    return [number for number in ours if signal.getsignal(number) != signal.SIG_IGN]


def _passed_on(number: int) -> int:
    return signal.SIGTERM if number == signal.SIGHUP else number
