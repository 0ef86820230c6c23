"""The trainer, with a rank that falls asleep in its second step: `WHERE RANK MEET settings...`.

WHERE is a function below; MEET a directory in which the ranks wait for each other before they
start, so that a timeout of seconds is long enough to connect.
"""

import os
import sys
import time
from pathlib import Path

from titan_vlm import train
from titan_vlm.data.loader import RowLoader
from titan_vlm.models.moe.exchange import AllToAllDispatcher

STEP = 1  # steps done before


def data(sleep):
    whole = RowLoader.__next__

    def row(loader):
        sleep()
        return whole(loader)

    RowLoader.__next__ = row


def experts(sleep):
    whole = AllToAllDispatcher.dispatch

    def dispatch(*given):
        sleep()
        return whole(*given)

    AllToAllDispatcher.dispatch = dispatch


def main(where: str, rank: str, meet: str, *settings: str) -> int:
    step, whole = -1, train.train_step

    def train_step(run, metrics):
        nonlocal step
        step = run.step
        whole(run, metrics)

    def sleep():
        if step == STEP and os.environ["RANK"] == rank:
            time.sleep(600)

    {"data": data, "experts": experts}[where](sleep)
    train.train_step = train_step
    Path(meet, os.environ["RANK"]).touch()
    while len(list(Path(meet).iterdir())) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)
    return train.main(list(settings))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
