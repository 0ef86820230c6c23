"""Ends a run in which a rank does not arrive at a collective, and says which rank.

    rank 0, 2     wait; after `comm.timeout_s` gloo raises in the main thread, or NCCL's watchdog
                  notices: SIGNAL goes into the store
    every rank    has a thread that looks for SIGNAL every second, also while the rank is stuck in
                  Python. The thread
                  - puts an answer into the store: how long this rank has been waiting, and in
                    what, or where it is instead;
                  - writes stacks and the flight recorder to `<output_dir>/flight_recorder`;
                  - reads all answers, prints one line and ends the process with status 1.

A thread ends the process, because no exception reaches a main thread that sleeps or is in C++.
"""

import json
import os
import re
import sys
import threading
import time
import traceback
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.distributed_c10d import _get_default_store

from titan_vlm import events, flight_recorder
from titan_vlm.distributed import world_size

POLL_S = 1.0
ANSWER_S = 20.0  # for all answers; NCCL's watchdog aborts the process after a minute
# NCCL's own key: its watchdog sets it, and dumps its recorder on every rank that finds it set.
SIGNAL = "exception_dump"
TIMED_OUT = re.compile("Timed out waiting|wait timeout|Connect timeout|timed out connecting")
PACKAGE = Path(__file__).parent


class Watch:
    """`with Watch(...) as watch:` around all that talks to other ranks; one process has no watch.

    `watch.step` is the step at work, for the message.
    """

    def __init__(self, timeout_s: float, directory: Path):
        self.step = 0
        self.timeout_s = timeout_s
        self.directory = directory
        self._error: BaseException | None = None  # of a collective, in the main thread
        self._timed_out = False
        self._ending = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang", daemon=True)

    def __enter__(self) -> "Watch":
        if world_size() > 1:
            for name, value in flight_recorder.nccl_environment(self.directory).items():
                os.environ.setdefault(name, value)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._thread.is_alive():
            return
        text = str(error) if isinstance(error, RuntimeError | CheckpointException) else ""
        if re.search("gloo|NCCL", text) or TIMED_OUT.search(text):
            self._error = error
            self._timed_out = bool(TIMED_OUT.search(text))
            # A peer closed the connection: it crashed, or gave up waiting and is about to say so.
            self._ending.wait(0 if self._timed_out else 3 * POLL_S)
        self._wake.set()
        self._thread.join()  # does not come back from a hang
        with suppress(OSError):  # not there, or an older hang is in it
            self.directory.rmdir()

    def _run(self) -> None:
        """What the thread does."""
        while not dist.is_initialized():
            if self._wake.wait(POLL_S):
                return
        flight_recorder.make_room(self.directory)
        with suppress(dist.DistError):  # the store goes when its host ends: then others end us
            # A connection of its own: the main thread may be waiting in that of the group. Without
            # the group's prefix, as NCCL writes and reads SIGNAL.
            store = _get_default_store()._underlying_non_prefix_store.clone()
            while not (self._timed_out or store.check([SIGNAL])):
                if self._wake.wait(POLL_S) and not self._timed_out:
                    return
            self._end(store)

    def _end(self, store: dist.Store) -> None:
        self._ending.set()
        try:
            said = self._report(store)
        except Exception as error:
            said = f"a collective took longer than comm.timeout_s = {self.timeout_s:g} s: {error}"
        events.write("stop", step=self.step, reason="error", error=said)
        try:
            print(f"error: {said}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            # torchrun kills the others as soon as one ends: not before each has printed. The
            # first to end is the one that torchrun names: the one whose output it shows.
            time.sleep((2 if os.environ.get("LOCAL_RANK") == "0" else 3) * POLL_S)
        finally:
            os._exit(1)

    def _report(self, store: dist.Store) -> str:
        rank = dist.get_rank()
        if not store.check([SIGNAL]):
            store.set(SIGNAL, rank.to_bytes(4, sys.byteorder))
        dump = flight_recorder.gloo_dump()
        entries = dump["entries"] + flight_recorder.nccl_entries()
        store.set(_key(rank), json.dumps(self._answer(entries)))
        where = flight_recorder.write(self.directory, dump, self._error)
        return f"{explain(_answers(store), self.timeout_s)}; stacks and flight recorder: {where}"

    def _answer(self, entries: list[dict]) -> dict[str, Any]:
        """How long this rank has been waiting (seconds; 0: it is not), in what, and where it is."""
        frame = sys._current_frames()[threading.main_thread().ident]
        answer = {"step": self.step, "at": _place(self._error, frame), "in": "", "waited_s": 0.0}
        running = [entry for entry in entries if flight_recorder.is_running(entry)]
        if self._error:  # then the newest one is that which failed
            running = entries[-1:]
        if running:
            answer["in"] = f"{running[0]['profiling_name']} of {running[0]['process_group'][1]}"
            answer["waited_s"] = time.time() - running[0]["time_created_ns"] / 1e9
        elif self._timed_out or frame.f_code.co_filename.endswith("distributed_c10d.py"):
            answer |= {"in": "the making of a process group", "waited_s": self.timeout_s}
        return answer


def explain(answers: list[dict[str, Any] | None], timeout_s: float) -> str:
    """One line about who did not arrive, from what each rank answered (None: nothing)."""
    late: dict[int, str] = {}
    waiting: dict[str, list[int]] = defaultdict(list)
    for rank, answer in enumerate(answers):
        if answer is None:
            late[rank] = "gives no answer"
        elif answer["waited_s"] < timeout_s / 2:  # the others have waited for about all of it
            late[rank] = f"is at step {answer['step']} in {answer['at']}"
        else:
            waiting[answer["in"]].append(rank)
    limit = f"comm.timeout_s = {timeout_s:g} s"
    said = f"{_ranks(list(late))} did not arrive within {limit}"
    if not late:
        said = f"the ranks wait for each other for longer than {limit}"
    said += "".join(f"; rank {rank} {place}" for rank, place in list(late.items())[:8])
    return said + "".join(f"; {_ranks(ranks)} waited in {what}" for what, ranks in waiting.items())


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {names}"


def _answers(store: dist.Store) -> list[dict[str, Any] | None]:
    """What every rank answered within `ANSWER_S`."""
    keys = [_key(rank) for rank in range(dist.get_world_size())]
    end = time.monotonic() + ANSWER_S
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(POLL_S / 4)
    return [json.loads(store.get(key)) if store.check([key]) else None for key in keys]


def _key(rank: int) -> str:
    return f"titan_vlm/hang/rank{rank}"


def _place(error: BaseException | None, frame: Any) -> str:
    """File, line and function of the innermost frame of this package, or of all: of those that
    `error` came through, or of those that run."""
    walk = traceback.walk_stack(frame)
    if error:
        walk = reversed(list(traceback.walk_tb(error.__traceback__)))
    stack = [(f.f_code, line) for f, line in walk]
    ours = [(code, line) for code, line in stack if Path(code.co_filename).is_relative_to(PACKAGE)]
    code, line = (ours or stack)[0]
    name = os.path.relpath(code.co_filename, PACKAGE.parent) if ours else code.co_filename
    return f"{name}:{line} ({code.co_name})"
