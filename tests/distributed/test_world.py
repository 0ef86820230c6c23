"""The long-lived world itself: what a job leaves behind would slow down all that follow."""

import os

from tests.small_run import Silent, small_config
from titan_vlm import train


def one_step(folder) -> None:
    run = train.prepare(small_config(folder, parallelism__dp_shard="2", checkpoint__every="0"))
    train.train_step(run, Silent())


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_jobs_process_groups_and_their_threads_end_with_it(world, tmp_path):
    world.run(2, one_step, tmp_path / "0")
    before = world.run(2, threads)
    for k in range(1, 5):
        world.run(2, one_step, tmp_path / str(k))
    more = [b - a for a, b in zip(before, world.run(2, threads), strict=True)]
    assert max(more) <= 2  # of libraries, which start theirs late; groups would leave six and more
