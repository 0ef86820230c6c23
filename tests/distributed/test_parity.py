"""Parallelism never changes the mathematics: every mesh against the single process, float64."""

import json
from dataclasses import replace

import pytest
import torch

from scripts.check_parity import (
    ALL,
    LIMITS,
    QUICK,
    compare,
    judged,
    ranks_and_words,
    record,
    small_words,
)
from titan_vlm import train
from titan_vlm.data.rows import collate
from titan_vlm.models.inputs import IGNORE_LABEL
from titan_vlm.models.qwen3_vl.config import FLAVORS, to_hf
from titan_vlm.models.qwen3_vl.plan import tensor_plan

FAST = {
    *QUICK,
    "pp=2,pp_schedule=InterleavedZeroBubble",
    "pp=2,pp_schedule=ZBVZeroBubble",
    "pp=2,dp_shard=2,tp=2",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return [*small_words(tmp_path_factory.mktemp("data")), "--run.device", "cpu"]


@pytest.fixture(scope="module")
def single(words, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("single"))
    return record([*words, "--training.dtype", "float64", "--run.output_dir", output])


@pytest.mark.parametrize(
    "mesh", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in ALL]
)
def test_a_mesh_trains_what_one_process_trains(world, words, single, tmp_path, mesh):
    assert_parity(world, words, single, tmp_path, mesh, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp_shard=2", "ep=2,tp=2", "pp=2,tp=2"])
def test_in_float32_loss_and_gradients_are_the_same(world, words, tmp_path, mesh):
    output = str(tmp_path / "single")
    single = record([*words, "--training.dtype", "float32", "--run.output_dir", output])
    assert_parity(world, words, single, tmp_path / "mesh", mesh, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp_shard=2", "pp=2,pp_microbatches=2", "pp=2,ep=2"])
def test_three_accumulated_micro_batches(world, words, tmp_path, mesh):
    words = [*words, "--training.global_batch_size", "12", "--training.steps", "2"]
    single = record([*words, "--training.dtype", "float64", "--run.output_dir", str(tmp_path)])
    assert_parity(world, words, single, tmp_path / "mesh", mesh, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp=2", "pp=2,dp_shard=2", "pp=2,tp=2,pp_schedule=DualPipeV"])
def test_the_dense_model(world, words, tmp_path, mesh):
    dims = replace(FLAVORS["debug"], tie_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(dims)))
    words = [*words, "--model.flavor", "hf", "--model.hf_path", str(tmp_path)]
    words += ["--training.steps", "2"]
    single = record([*words, "--training.dtype", "float64", "--run.output_dir", str(tmp_path)])
    assert_parity(world, words, single, tmp_path / "mesh", mesh, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp_shard=2", "ep=2,tp=2", "pp=2,dp_shard=2"])
def test_a_frozen_branch(world, words, tmp_path, mesh):
    words = [*words, "--training.freeze", "vision", "--training.steps", "2"]
    single = record([*words, "--training.dtype", "float64", "--run.output_dir", str(tmp_path)])
    assert_parity(world, words, single, tmp_path / "mesh", mesh, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp=2", "pp=2,tp=2,sequence_parallel=false"])
def test_a_vision_tower_whose_heads_tp_does_not_divide_is_replicated(world, words, tmp_path, mesh):
    debug = FLAVORS["debug_moe"]
    dims = replace(debug, vision=replace(debug.vision, num_heads=3))
    assert not tensor_plan(dims, 2)["pair_of_patches"]
    (tmp_path / "config.json").write_text(json.dumps(to_hf(dims)))
    words = [*words, "--model.flavor", "hf", "--model.hf_path", str(tmp_path)]
    words += ["--training.steps", "2"]
    single = record([*words, "--training.dtype", "float64", "--run.output_dir", str(tmp_path)])
    assert_parity(world, words, single, tmp_path / "mesh", mesh, "float64")


@pytest.mark.parametrize(
    "mesh",
    ["dp_shard=2", *(pytest.param(m, marks=pytest.mark.slow) for m in ("ep=2,tp=2", "pp=2,ep=2"))],
)
def test_micro_batches_without_any_token_take_part(world, words, tmp_path, mesh):
    """Every other row is padding alone: no token, no target, no picture, on some ranks for whole
    micro-batches."""
    words = [*words, "--training.micro_batch_size", "1", "--training.steps", "2"]
    single = record_emptied([*words, "--training.dtype", "float64"], tmp_path / "single")
    ranks, changes = ranks_and_words(mesh)
    words += ["--training.dtype", "float64", *changes]
    trace = world.run(ranks, record_emptied, words, tmp_path / "mesh")[0]
    errors = compare(trace, single)
    assert max(errors[kind][0] for kind in judged("float64")) <= LIMITS["float64"], errors


def record_emptied(words, output):
    def emptied(rows, moment):
        rows = [without_tokens(row) if row.tokens_S.sum() % 2 else row for row in rows]
        return collate(rows, moment)

    train.collate = emptied
    try:
        return record([*words, "--run.output_dir", str(output)])
    finally:
        train.collate = collate


def without_tokens(row):
    return replace(
        row,
        labels_S=torch.full_like(row.labels_S, IGNORE_LABEL),
        valid_S=torch.zeros_like(row.valid_S),
        doc_lens=[len(row.tokens_S)],
        pixels_NC=row.pixels_NC[:0],
        grids=[],
        visual_index_M=row.visual_index_M[:0],
    )


def assert_parity(world, words, single, output, mesh, dtype):
    ranks, changes = ranks_and_words(mesh)
    words = [*words, "--training.dtype", dtype, *changes, "--run.output_dir", str(output)]
    trace = world.run(ranks, record, words)[0]
    assert len(trace.gradients) == len(single.gradients) >= 2
    errors = compare(trace, single)
    for kind in judged(dtype):
        error, where = errors[kind]
        assert error <= LIMITS[dtype], f"{kind}: {error:.1e} at {where}"


def test_the_data_holds_what_a_mesh_could_stumble_over(single):
    assert {0, 1} < set(single.images)  # micro-batches without images, and with several
    assert single.norms[0] > 0.5  # clipping is active
    clipped = torch.stack([grad.norm() for grad in single.gradients[0].values()]).norm()
    assert clipped.item() == pytest.approx(0.5, rel=1e-5)
