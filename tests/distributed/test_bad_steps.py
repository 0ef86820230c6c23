"""Steps that go wrong on one rank of several: all leave the update out together."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_timeout import ENDS_S, environment
from tests.faults.bad_steps import (
    STEERED,
    Listener,
    assert_same,
    by_hand,
    guarded,
    leave_out,
    rows_changed,
    spoil_pixels,
    spoiled_steps,
    state_of,
)
from tests.small_run import curve, run, words

ROOT = Path(__file__).parents[2]
FOUR_ROWS = STEERED | {"training__global_batch_size": "4"}
MESHES = {
    "fsdp": {"parallelism__dp_shard": "2"},
    "experts": {"parallelism__ep": "2"},
    "tensors": {"parallelism__tp": "2"},
    "pipeline": {"parallelism__pp": "2"},
}


# In the pipeline the last stage has the loss and all routers.
@pytest.mark.parametrize(
    ("mesh", "kind", "rank"),
    [
        ("fsdp", "gradient", 0),
        ("fsdp", "loss", 0),
        ("fsdp", "router", 1),
        ("pipeline", "gradient", 0),
        ("pipeline", "gradient", 1),
        ("pipeline", "loss", 1),
        ("pipeline", "router", 1),
        ("experts", "gradient", 1),
        ("tensors", "gradient", 1),
        ("tensors", "router", 0),
    ],
)
def test_what_one_rank_sees_all_skip(world, tmp_path, mesh, kind, rank):
    changes = FOUR_ROWS | MESHES[mesh]
    ours = world.run(2, skip_step_two, tmp_path / "ours", changes, kind, rank)
    theirs = world.run(2, leave_step_two_out, tmp_path / "theirs", changes)
    for (counts, told, state), wanted in zip(ours, theirs, strict=True):
        assert counts == {"skipped_steps": 1, "passed_rows": 0, "rollbacks": 0}
        assert told == ours[0][1] and told[0][0] == "skip"
        assert_same(state, wanted)
    assert len(told[0][2]) > 8  # samples of both ranks


def skip_step_two(output, changes, kind, rank):
    told = []

    def tell(kind, **facts):
        told.append((kind, facts["why"], facts["samples"]))

    with spoiled_steps(kind, {2}, rank):
        run_ = guarded(output, changes, 3, tell)
    return run_.guard.counts(), told, state_of(run_)


def leave_step_two_out(output, changes):
    return state_of(by_hand(output, changes, {2}, 3))


@pytest.mark.parametrize(
    "mesh",
    [m if m == "pipeline" else pytest.param(m, marks=pytest.mark.slow) for m in MESHES],
)
def test_a_rollback_for_one_ranks_pixels_gives_the_run_without_these_rows(world, tmp_path, mesh):
    """Row 17 of step 5, row 21 of step 6: with data parallelism both are those of rank 1."""
    changes = FOUR_ROWS | MESHES[mesh] | {"guards__max_skips": "2", "training__steps": "8"}
    said = world.run(2, run_with_rows, tmp_path / "ours", changes, spoil_pixels, {17, 21})
    assert [status for status, _ in said] == [0, 0]
    rolled = [text for _, texts in said for text in texts if text.startswith("rolled back")]
    assert len(rolled) == 1 and rolled[0].startswith("rolled back to step 3")  # by rank 0 alone
    theirs = world.run(
        2, run_with_rows, tmp_path / "theirs", changes, leave_out, set(range(16, 24))
    )
    assert [status for status, _ in theirs] == [0, 0]
    assert curve(tmp_path / "ours") == curve(tmp_path / "theirs")
    assert len(curve(tmp_path / "ours")) == 8


def run_with_rows(output, changes, change, numbers):
    with rows_changed(change(numbers)), Listener() as heard:
        return run(output, **changes), heard.said


# ---------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_out_of_memory_on_one_rank_ends_all_and_says_what_would_help(tmp_path, rank):
    """Rank 0 is the one whose output is shown; what rank 1 says, the launcher shows."""
    ended = subprocess.run(
        [sys.executable, "-P", ROOT / "scripts" / "launch.py", "--standalone"]
        + ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", "--local-ranks-filter", "0"]
        + [__file__, str(rank), "--config", "qwen_vlm_moe.toml"]
        + words(tmp_path, {"training__micro_batch_size": "2", "training__global_batch_size": "4"}),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=ENDS_S,
    )
    assert ended.returncode == 1
    start = f"error: rank {rank} is out of memory at step 2: CUDA out of memory. Tried to"
    assert ended.stderr.count(start) == 1
    block = ended.stderr[ended.stderr.index(start) :].splitlines()
    held = re.match(
        r"  held: parameters (\S+) GiB, gradients \S+ GiB, optimizer (\S+) GiB, activations",
        block[1],
    )
    assert held and float(held[1]) > 0
    assert re.match(r"  resident \d.\d\d GiB, limit \d+\.\d\d GiB", block[2])
    assert "    training.micro_batch_size = 2: lower it" in block[4]
    assert any('activation_checkpoint.mode = "none"' in line for line in block)
    assert any("data.max_pixels = " in line for line in block)


def main(rank: str, *settings: str) -> int:
    """The trainer, with a rank that has no memory for its second step."""
    import torch

    from titan_vlm import train

    whole = train.forward_backward

    def forward_backward(state, batches, targets):
        if state.step == 1 and os.environ["RANK"] == rank:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        return whole(state, batches, targets)

    train.forward_backward = forward_backward
    return train.main(list(settings))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
