"""The long-lived world itself: what a job leaves behind would slow down all that follow."""

import time
from pathlib import Path

import pytest

from tests.small_run import Silent, small_config
from titan_vlm import train


def one_step(folder, axis) -> None:
    changes = {f"parallelism__{axis}": "2", "checkpoint__every": "0"}
    run = train.prepare(small_config(folder, **changes))
    train.train_step(run, Silent())


def gloo_threads() -> int:
    names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


def one_step_and_threads(folder, axis) -> int:
    one_step(folder, axis)
    return gloo_threads()


def threads_that_stay() -> int:
    end = time.monotonic() + 20  # those of a group that is gone take a moment
    while gloo_threads() and time.monotonic() < end:
        time.sleep(0.1)
    return gloo_threads()


@pytest.mark.parametrize("axis", ["dp_shard", "tp", "ep", "pp"])
def test_a_jobs_process_groups_and_their_threads_end_with_it(world, tmp_path, axis):
    before = world.run(2, threads_that_stay)
    during = world.run(2, one_step_and_threads, tmp_path, axis)
    after = world.run(2, threads_that_stay)
    assert all(b < d and a <= b for b, d, a in zip(before, during, after, strict=True))
