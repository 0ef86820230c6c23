"""Runs the small trainer in lives: each is killed with SIGKILL at a chosen instant, and the next
one resumes; `python -m tests.faults.kills OUTPUT SEED KILLS [word ...]` prints how each life ended.

A life is a fork of this process, which has imported everything: it takes a second instead of ten.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager

from tests.small_run import run
from titan_vlm import train
from titan_vlm.evaluation.validate import Validator
from titan_vlm.training import checkpoint, history, manifest, storage

LONGEST_S = 6.0  # of a life until it is killed at an instant that is no place
MOST_STEPS = 3  # of any life


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the other threads must not get any further


def before(owner: object, name: str) -> Callable[[int], None]:
    return lambda call: _count_down(owner, name, call, first=True)


def after(owner: object, name: str) -> Callable[[int], None]:
    return lambda call: _count_down(owner, name, call, first=False)


def _count_down(owner: object, name: str, call: int, first: bool) -> None:
    """The process dies before (`first`) or after the `call`-th call of owner.name."""
    original, left = getattr(owner, name), [call]

    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and first:
            die()
        result = original(*args, **kwargs)
        if left[0] == 0:
            die()
        return result

    setattr(owner, name, wrapped)


def at_random(seed: int) -> None:
    """The process dies within `LONGEST_S` seconds."""
    delay = random.Random(seed).uniform(0.2, LONGEST_S)
    threading.Timer(delay, die).start()


# Each takes a number: which call, or a seed.
PLACES: dict[str, Callable[[int], None]] = {
    "at any time": at_random,
    "in the step, forward and backward done": after(train, "forward_backward"),
    "in the step, weights changed": after(torch.optim.AdamW, "step"),
    "the step done": after(train, "report_step"),
    "before staging": before(DefaultStager, "stage"),
    "after staging": after(DefaultStager, "stage"),
    "before writing": before(FileSystemWriter, "write_data"),
    "in the middle of a file": before(storage._Counted, "write"),
    "all files written, no manifest": before(manifest, "make"),
    "manifest written, not renamed": before(storage, "_sync_folder"),
    "renamed": after(storage.os, "rename"),
    "before pruning": before(history.History, "prune"),
    "in the middle of pruning": before(storage.shutil, "rmtree"),
    "in validation": before(Validator, "run"),
    "while resuming": after(checkpoint.Checkpointer, "load"),
}


def live(output: Path, plan: tuple[str, int] | None, changes: dict[str, str]) -> int:
    """One life of the run: its exit status, or -9 where it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = os.open(output.parent / f"{output.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        if plan:
            PLACES["the step done"](MOST_STEPS)  # where it does not come to the place
            PLACES[plan[0]](plan[1])
        status = run(output, **changes)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(output: Path, seed: int, kills: int, words: list[str]) -> None:
    changes = dict(word.split("=", 1) for word in words)
    chance = random.Random(seed)
    places = list(PLACES)
    chance.shuffle(places)
    output.parent.mkdir(parents=True, exist_ok=True)
    died = number = 0
    while died < kills:
        place = places[number % len(places)]
        plan = place, chance.choice((1, 1, 2, 3)) if place != "at any time" else number
        number += 1
        status = live(output, plan, changes)
        print(f"{place} ({plan[1]}): {status}", flush=True)
        if status != -signal.SIGKILL:
            break
        died += 1
    if died == kills:
        print(f"to the end: {live(output, None, changes)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
