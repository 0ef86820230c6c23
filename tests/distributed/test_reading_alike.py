"""What ranks read by themselves is the same, or the run ends on all of them, with its reason."""

import json
import os
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from tests.distributed.test_data_parallel import run_and_listen
from tests.unit.test_data_mixture import talks
from titan_vlm import events
from titan_vlm.data.loader import RowLoader
from titan_vlm.data.sample import ImageRef
from titan_vlm.errors import DataError, ReadError
from titan_vlm.evaluation.validate import Validator

MESHES = {
    "dp": {"parallelism__dp_shard": "2"},
    "tp": {"parallelism__tp": "2"},
    "pp": {"parallelism__pp": "2"},
}
ROWS = {"training__global_batch_size": "4", "checkpoint__export_hf": "false"}


def is_rank(number):
    return int(os.environ["RANK"]) == number


def errors_of(answers):
    """The one line that each rank has said; all ended with status 2."""
    assert [status for status, _ in answers] == [2] * len(answers)
    said = [[x for x in text.splitlines() if x.startswith("error: ")] for _, text in answers]
    assert [len(lines) for lines in said] == [1] * len(answers)
    return [line.removeprefix("error: ") for (line,) in said]


# ---------------------------------------------------------------------------- before the first step


def run_on_own_copy(output, key, paths, changes):
    path = paths[int(os.environ["RANK"])]
    return run_and_listen(output, ROWS | changes | {key: path})


@pytest.mark.parametrize("mesh", ["dp", "tp"])
def test_other_copies_of_the_data_are_refused_and_the_ranks_named(world, tmp_path, mesh):
    paths = [talks(tmp_path, name, number) for name, number in (("a", 23), ("b", 22))]
    changes = MESHES[mesh] | {"data__source": "openai"}
    answers = world.run(2, run_on_own_copy, tmp_path / "run", "data__path", paths, changes)
    for line in errors_of(answers):
        assert line.startswith("number of samples in data.path = 23 on rank 0 (")
        assert ", but 22 on rank 1 (" in line
    assert not (tmp_path / "run" / "config.toml").exists()
    (*_, stop) = events.read(tmp_path / "run")
    assert stop["reason"] == "refused"


def test_what_one_rank_cannot_open_all_are_told(world, tmp_path):
    paths = [talks(tmp_path, "a", 23), str(tmp_path / "gone.jsonl")]
    changes = MESHES["dp"] | {"data__source": "openai"}
    answers = world.run(2, run_on_own_copy, tmp_path / "run", "data__path", paths, changes)
    first, second = errors_of(answers)
    assert (
        second.startswith(f"data.path: {paths[1]}: no such file") and first == f"rank 1: {second}"
    )
    (*_, stop) = events.read(tmp_path / "run")
    assert stop["reason"] == "refused" and "rank 1: data.path" in stop["error"]


def test_other_held_out_samples_are_refused(world, tmp_path):
    """As many, but not the same."""
    paths = [talks(tmp_path, name, 9) for name in "ab"]
    changes = MESHES["dp"] | {"data__source": "openai", "data__path": talks(tmp_path, "c", 23)}
    answers = world.run(2, run_on_own_copy, tmp_path / "run", "eval__path", paths, changes)
    for line in errors_of(answers):
        assert line.startswith("digest of the held-out samples = ") and "on rank 1 (" in line


def test_held_out_data_that_are_not_there_are_refused_before_the_model(world, tmp_path):
    changes = {"data__source": "openai", "data__path": talks(tmp_path, "c", 23)}
    gone = str(tmp_path / "gone.jsonl")
    built = patch("titan_vlm.train.build", side_effect=AssertionError("too late"))
    with built:
        answer = run_and_listen(tmp_path / "run", ROWS | changes | {"eval__path": gone})
    (line,) = errors_of([answer])
    assert line.startswith(f"eval.path: {gone}: no such file")
    (*_, stop) = events.read(tmp_path / "run")
    assert stop["reason"] == "refused" and not (tmp_path / "run" / "run.json").exists()


# ---------------------------------------------------------------------------- in a step


@contextmanager
def rank_one_reads(change):
    """From its ninth row on, rank 1 has what `change` makes of rows."""
    whole, left = RowLoader.__next__, 8

    def changed(loader):
        nonlocal left
        row, left = whole(loader), left - 1
        return row if left >= 0 or not is_rank(1) else change(row)

    with patch.object(RowLoader, "__next__", changed):
        yield


def run_with_rows(output, changes, change):
    with rank_one_reads(change):
        return run_and_listen(output, ROWS | changes)


def without_a_sample(row):
    row.sample_ids[-1:] = ["digits:0:none"]
    return row


def that_cannot_be_read(row):
    raise ReadError("disk/a.png: Input/output error")


def of_a_shard_without_use(row):
    raise DataError("none of the last 1000 samples can be used")


@pytest.mark.parametrize("mesh", ["tp", "pp"])
def test_ranks_that_share_rows_and_read_others_end_the_run_naming_the_step(world, tmp_path, mesh):
    answers = world.run(2, run_with_rows, tmp_path, MESHES[mesh], without_a_sample)
    for line in errors_of(answers):
        assert line.startswith("step 3: ranks along parallelism.tp and pp have read different rows")


@pytest.mark.parametrize("change", [that_cannot_be_read, of_a_shard_without_use])
@pytest.mark.parametrize("mesh", MESHES)
def test_what_one_rank_cannot_read_ends_all_with_its_reason(world, tmp_path, mesh, change):
    """At the same step, and a checkpoint that is being written comes to its end."""
    step = 4 if mesh == "dp" else 2  # of two or of four rows
    saving = {"checkpoint__every": str(step), "checkpoint__async_save": "true"}
    answers = world.run(2, run_with_rows, tmp_path, MESHES[mesh] | saving, change)
    first, second = errors_of(answers)
    assert (
        second.startswith(("disk/a.png: Input", "none of the last"))
        and first == f"rank 1: {second}"
    )
    steps = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in steps) == step
    assert (tmp_path / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()
    (*_, stop) = events.read(tmp_path)
    assert stop["reason"] == "error" and first in stop["error"]


# ---------------------------------------------------------------------------- in a validation


def run_with_a_picture_that_goes(output, changes):
    whole, load = Validator.run, ImageRef.load_rgb

    def gone(ref):
        raise DataError("a.png: broken image: No such file")

    def validating(validator, model, device):
        with patch.object(ImageRef, "load_rgb", gone if is_rank(1) else load):
            return whole(validator, model, device)

    with patch.object(Validator, "run", validating):
        return run_and_listen(output, ROWS | changes)


@pytest.mark.parametrize("mesh", ["dp", "tp"])
def test_a_held_out_picture_that_goes_for_one_rank_ends_all(world, tmp_path, mesh):
    changes = MESHES[mesh] | {"eval__every": "2", "training__steps": "3"}
    first, second = errors_of(world.run(2, run_with_a_picture_that_goes, tmp_path, changes))
    assert second == "a.png: broken image: No such file" and first == f"rank 1: {second}"
