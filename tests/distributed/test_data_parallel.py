"""FSDP2 over dp_shard: the same run on two ranks as on one."""

import io
import json
from contextlib import redirect_stderr

import pytest
import torch

from tests.small_run import curve, run, run_killed, weights

EXACT = {"training__dtype": "float64", "training__global_batch_size": "4"}


def test_two_ranks_give_the_single_process_run(world, tmp_path):
    exported = {"checkpoint__export_dtype": "float64"}
    assert run(tmp_path / "one", **EXACT, **exported) == 0
    assert world.run(2, run_small, tmp_path / "two", EXACT | exported) == [0, 0]
    assert_same_curve(tmp_path / "two", tmp_path / "one", rel=1e-9)
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_killed_run_of_two_ranks_resumes_bitwise(world, tmp_path, dtype):
    changes = {"training__dtype": dtype, "checkpoint__async_save": "true"}
    world.run(2, run_small, tmp_path / "whole", changes)
    world.run(2, run_small_killed, tmp_path / "killed", changes)
    world.run(2, run_small, tmp_path / "killed", changes)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    resumed, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("saving", "resuming"),
    [
        ((2, {"parallelism__ep": "2"}), (2, {"parallelism__tp": "2"})),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((2, {"parallelism__tp": "2"}), (2, {"parallelism__pp": "2"})),
                ((2, {"parallelism__dp_shard": "2"}), (1, {})),
                ((1, {}), (4, {"parallelism__dp_shard": "2", "parallelism__ep": "2"})),
                ((2, {"parallelism__pp": "2"}), (2, {"parallelism__ep": "2"})),
            )
        ),
    ],
)
def test_a_killed_run_resumes_on_another_mesh(world, tmp_path, saving, resuming):
    often = EXACT | {"checkpoint__every": "2", "metrics__log_every": "3"}
    world.run(1, run_small, tmp_path / "one", often)
    (ranks, axes), (others, other_axes) = saving, resuming
    world.run(ranks, run_small_killed, tmp_path / "moved", often | axes)
    assert world.run(others, run_small, tmp_path / "moved", often | other_axes) == [0] * others
    assert_same_curve(tmp_path / "moved", tmp_path / "one", rel=1e-9)
    ours, theirs = (expert_figures(tmp_path / name) for name in ("moved", "one"))
    assert ours == theirs  # of steps before the checkpoint too


def expert_figures(output):
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kinds = [{key: x for key, x in r.items() if key.startswith("experts/")} for r in records]
    return [figures for figures in kinds if figures]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training__global_batch_size": "1"}, "use 2"),
        ({"parallelism__ep": "2", "model__flavor": "debug"}, "1 experts of a layer over ep"),
        ({"parallelism__tp": "4"}, "does not divide the 2 processes"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_on_every_rank(world, tmp_path, changes, said):
    for status, printed in world.run(2, run_and_listen, tmp_path, changes):
        errors = [line for line in printed.splitlines() if line.startswith("error:")]
        assert status == 2
        assert len(errors) == 1 and said in errors[0]


def run_and_listen(output, changes):
    with redirect_stderr(io.StringIO()) as printed:
        status = run(output, **changes)
    return status, printed.getvalue()


def run_small(output, changes):
    return run(output, **changes)


def run_small_killed(output, changes):
    run_killed(output, step=4, **changes)


def assert_same_curve(ours, theirs, rel):
    for a, b in zip(curve(ours), curve(theirs), strict=True):
        assert a == pytest.approx(b, rel=rel)
