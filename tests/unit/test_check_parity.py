"""The parity tool's own bookkeeping: what it would call equal, and what it refuses."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from scripts import check_parity
from scripts.check_parity import Trace, compare, error, main, ranks_and_words


def trace(loss=1.0, gradient=1.0, weight=1.0, pairs=3):
    return Trace(
        losses=[loss],
        norms=[2.0],
        gradients=[{"w": torch.tensor([gradient, 0.0])}],
        weights={"w": torch.tensor([weight])},
        loads=[{"moe": [pairs, 1]}],
    )


def test_equal_traces_have_no_error():
    assert all(worst == 0 for worst, _ in compare(trace(), trace()).values())


@pytest.mark.parametrize(
    ("other", "kind", "where"),
    [
        ({"loss": 1.5}, "losses", "step 0"),
        ({"gradient": 1.5}, "gradients", "w, step 0"),
        ({"weight": 1.5}, "weights", "w"),
        ({"pairs": 4}, "loads", "step 0"),
    ],
)
def test_each_kind_of_difference_is_found_and_named(other, kind, where):
    errors = compare(trace(**other), trace())
    assert errors[kind][0] >= 0.5 and errors[kind][1] == where
    assert all(worst == 0 for name, (worst, _) in errors.items() if name != kind)


def test_the_error_is_relative_with_a_floor_and_shapes_must_agree():
    big, small = torch.tensor([100.0, 1.0]), torch.tensor([1e-12, 0.0])
    assert error(big + 1, big) == pytest.approx(0.01)
    assert error(small, torch.zeros(2), floor=1e-6) == pytest.approx(1e-6)
    assert error(torch.zeros(2), torch.zeros(1)) == float("inf")


def test_a_mesh_is_a_number_of_ranks_and_settings():
    ranks, words = ranks_and_words("ep=2,tp=3,expert_parallel_over_tp=true,training.steps=2")
    assert ranks == 6
    assert words[words.index("--parallelism.expert_parallel_over_tp") + 1] == "true"
    assert words[words.index("--training.steps") + 1] == "2"


@pytest.mark.parametrize(
    ("mesh", "said"), [("ep", "not key=value"), ("ep=x", "ep: expected"), ("ep=3", "use 2 or 4")]
)
def test_a_mesh_that_cannot_be_is_one_line_and_status_2(capfd, mesh, said):
    assert main(["--meshes", mesh]) == 2
    assert said in capfd.readouterr().err


DOCUMENTED = [
    line.partition("check_parity.py ")[2]
    for file in ("README.md", "docs/parallelism.md")
    for line in (Path(__file__).parents[2] / file).read_text().splitlines()
    if re.match(r"\.venv/bin/python scripts/check_parity\.py ", line)
]


@pytest.mark.parametrize("line", DOCUMENTED)
def test_what_the_documentation_says_to_run_is_not_refused(line, monkeypatch):
    """Every mesh is checked before the first process trains; it is that far that this goes."""

    def reached(*_):
        raise InterruptedError

    monkeypatch.setattr(check_parity, "record", reached)
    with pytest.raises(InterruptedError):
        main(shlex.split(line, comments=True))


def test_there_is_documentation():
    assert len(DOCUMENTED) >= 3
