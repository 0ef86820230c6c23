"""SIGKILL at any instant: the run that is started again is the run that never died, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.small_run import curve, weights
from titan_vlm.config import Checkpoint
from titan_vlm.data.ledger import read_ledger
from titan_vlm.training.checkpoint import Checkpointer

ROOT = Path(__file__).parents[2]
# Many saves, of which few are kept, and a validation: many places to die in.
CHANGES = [
    "training__steps=12",
    "checkpoint__every=1",
    "checkpoint__keep_latest_k=2",
    "data__ledger=true",
    "data__num_workers=2",
    "eval__every=4",
    "eval__samples=1",
]


def killed(output: Path, seed: int, kills: int, *more: str) -> list[str]:
    """How each life of the run ended."""
    command = [sys.executable, "-m", "tests.faults.kills", output, seed, kills, *CHANGES, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nobody kills."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert killed(output, 0, 0) == ["to the end: 0"]
    return output


def assert_same_run(output: Path, whole: Path) -> None:
    expected = {step: rest for step, *rest in curve(whole)}
    got = curve(output)
    assert {step for step, *_ in got} == set(expected)
    for step, *rest in got:  # a step that ran again, too
        assert rest == expected[step], step
    mine, theirs = weights(output), weights(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    ledger = read_ledger(output)
    assert ledger == read_ledger(whole)
    ids = [id for step in ledger.values() for row in step.rows for id in row]
    assert len(ids) == len(set(ids)) > 0
    checkpoints = Checkpointer(output / "checkpoints", Checkpoint())
    found = [checkpoints.history.problems(step) for step in checkpoints.history.steps()]
    assert found in ([[]] * 2, [[]] * 3)  # the one resumed from is kept besides


@pytest.mark.parametrize("async_save", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_is_the_run_that_was_not(tmp_path, whole, async_save):
    ends = killed(tmp_path / "run", 1, 4, f"checkpoint__async_save={async_save}")
    assert sum(end.endswith(": -9") for end in ends) == 4 and ends[-1] == "to the end: 0"
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
def test_forty_kills(tmp_path, whole, seed):
    ends = killed(tmp_path / "run", seed, 8, f"checkpoint__async_save={str(seed % 2 == 0).lower()}")
    assert sum(end.endswith(": -9") for end in ends) == 8 and ends[-1] == "to the end: 0"
    assert_same_run(tmp_path / "run", whole)
