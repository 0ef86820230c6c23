"""One run in five pieces, each on another mesh: the single process's weights and samples."""

import json

import pytest
import torch

from tests.distributed.test_data_parallel import EXACT, assert_same_curve
from tests.small_run import run, run_killed, weights
from titan_vlm.data.ledger import read_ledger

CHAIN = [
    (2, {"parallelism__dp_shard": "2"}),
    (4, {"parallelism__ep": "2", "parallelism__tp": "2"}),
    (2, {"parallelism__pp": "2"}),
    (1, {"data__num_workers": "2"}),
    (4, {"parallelism__dp_shard": "4"}),
]
STEPS_EACH = 2


def talks(folder) -> str:
    """Forty short conversations without a picture: an epoch of them ends within the run."""
    path = folder / "talks.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {n}?"},
                {"role": "assistant", "content": f"{n + 1}"},
            ]
        }
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("by", ["samples", pytest.param("tokens", marks=pytest.mark.slow)])
def test_a_chain_of_meshes_is_one_run(world, tmp_path, by):
    sources = (
        '[{name = "digits", source = "digits", weight = 2.0}, '
        f'{{name = "talks", source = "openai", path = "{talks(tmp_path)}", weight = 1.0}}]'
    )
    settings = EXACT | {
        "training__steps": str(STEPS_EACH * len(CHAIN)),
        "checkpoint__every": "1",
        "checkpoint__export_dtype": "float64",
        "data__sources": sources,
        "data__mixture_by": by,
        "data__ledger": "true",
        "metrics__log_every": "2",
    }
    assert run(tmp_path / "one", **settings) == 0
    for piece, (ranks, axes) in enumerate(CHAIN, start=1):
        last = piece == len(CHAIN)
        job = run_to_the_end if last else run_piece
        arguments = (tmp_path / "chain", STEPS_EACH * piece, settings | axes)
        if ranks == 1:  # the ranks of the world may not start workers
            assert job(*arguments) == 0
        else:
            assert world.run(ranks, job, *arguments) == [0] * ranks
    assert_same_curve(tmp_path / "chain", tmp_path / "one", rel=1e-9)
    ours, theirs = weights(tmp_path / "chain"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-9, atol=1e-9, msg=name)
    ledger = read_ledger(tmp_path / "chain")
    assert ledger == read_ledger(tmp_path / "one")
    ids = [id for step in ledger.values() for row in step.rows for id in row]
    assert len(ids) == len(set(ids))
    assert {id.split(":")[0] for id in ids} == {"digits", "talks"}
    assert "talks:1" in {id.rpartition(":")[0] for id in ids}  # a second epoch began


def run_piece(output, step, changes):
    run_killed(output, step=step, **changes)
    return 0


def run_to_the_end(output, step, changes):
    return run(output, **changes)
