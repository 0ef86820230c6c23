"""Parallelism never changes the mathematics: every mesh against the single process, float64."""

import pytest
import torch

from scripts.check_parity import ALL, LIMIT, QUICK, compare, ranks_and_words, record, small_words

EXACT = ["--training.dtype", "float64", "--run.device", "cpu"]
FAST = {*QUICK, "dp_replicate=2,ep=2", "tp=2,sequence_parallel=false", "dp_shard=2,ep=2,tp=2"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return [*small_words(tmp_path_factory.mktemp("data")), *EXACT]


@pytest.fixture(scope="module")
def single(words, tmp_path_factory):
    return record([*words, "--run.output_dir", str(tmp_path_factory.mktemp("single"))])


@pytest.mark.parametrize(
    "mesh", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in ALL]
)
def test_a_mesh_trains_what_one_process_trains(world, words, single, tmp_path, mesh):
    ranks, changes = ranks_and_words(mesh)
    traces = world.run(ranks, record, [*words, *changes, "--run.output_dir", str(tmp_path)])
    assert len(traces[0].gradients) == 5
    for kind, (error, where) in compare(traces[0], single).items():
        assert error <= LIMIT, f"{kind}: {error:.1e} at {where}"


def test_the_data_holds_what_a_mesh_could_stumble_over(single):
    assert {0, 1} < set(single.images)  # micro-batches without images, and with several
    assert single.norms[0] > 0.5  # clipping is active
    clipped = torch.stack([grad.norm() for grad in single.gradients[0].values()]).norm()
    assert clipped.item() == pytest.approx(0.5, rel=1e-5)
