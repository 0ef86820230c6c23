"""OmniMoE on every kind of mesh against one process, float64, through the trainer."""

import pytest

from scripts.check_parity import (
    LIMITS,
    compare,
    joint_micro_batch,
    judged,
    ranks_and_words,
    record,
    small_words,
)

OMNI = {
    "model.name": "omni",
    "model.flavor": "debug",
    "projector.levels": "1:0,2:2,pooled:2,final:1",
    "moe.text.experts": "8",
    "moe.text.top_k": "2",
    "moe.text.expert_width": "64",
    "moe.text.score": "sigmoid",
    "moe.text.bias_update": "sign",
    "moe.text.shared_width": "32",
    "moe.vision.experts": "4",
    "moe.vision.top_k": "1",
    "moe.vision.expert_width": "64",
    "moe.vision.layers": "2,3",
    "moe.vision.router": "expert_choice",
    "moe.vision.capacity_factor": "1.0",
    "moe.vision.normalize": "false",
    "moe.vision.activation": "gelu",
    "moe.vision.expert_bias": "true",
    "moe.projector.experts": "4",
    "moe.projector.top_k": "2",
    "moe.projector.expert_width": "48",
    "moe.projector.aux_loss": "0.01",
}
REDUCTIONS = {
    "merge": {},
    "none": {"projector.reduction": "none"},
    "resampler": {
        "projector.reduction": "resampler",
        "projector.tokens": "5",
        "projector.positions": "1d",
    },
    "qformer": {
        "projector.reduction": "qformer",
        "projector.tokens": "5",
        "projector.positions": "1d",
        "projector.layers": "3",
    },
    # Dense everywhere, so that bridges and blocks are split by TP.
    "dense": {f"moe.{branch}.experts": "0" for branch in ("text", "vision", "projector")},
}
MESHES = (
    "ep=2,tp=2",
    "dp_shard=2",
    "pp=2",
    "pp=2,tp=2,sequence_parallel=false",
    "pp=2,pp_schedule=ZBVZeroBubble",
    "dp_shard=2,ep=2",
    "ep=2,tp=2,expert_parallel_over_tp=true",
    "pp=2,ep=2",
)
FAST = {
    ("merge", "ep=2,tp=2"),
    ("resampler", "pp=2,ep=2"),
    ("dense", "pp=2,tp=2,sequence_parallel=false"),
}
CASES = [
    pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
    for case in ((reduction, mesh) for reduction in REDUCTIONS for mesh in MESHES)
    if case[0] != "dense" or "ep=" not in case[1]
]


@pytest.mark.parametrize(("reduction", "mesh"), CASES)
def test_a_mesh_trains_what_one_process_trains(world, tmp_path, reduction, mesh):
    settings = OMNI | REDUCTIONS[reduction]
    if reduction == "dense":
        settings = {k: v for k, v in settings.items() if not k.startswith("moe.")}
    words = small_words(tmp_path) + [w for k, v in settings.items() for w in (f"--{k}", v)]
    words += ["--run.device", "cpu", "--training.dtype", "float64", "--training.steps", "2"]
    ranks, changes = ranks_and_words(mesh)
    rows = ["--training.micro_batch_size", str(joint_micro_batch(words, changes))]
    single = record([*words, *rows, "--run.output_dir", str(tmp_path / "single")])
    here = [*words, *changes, "--run.output_dir", str(tmp_path / "mesh")]
    trace = world.run(ranks, record, here)[0]
    assert sum(single.images) > 0
    errors = compare(trace, single)
    assert max(errors[kind][0] for kind in judged("float64")) <= LIMITS["float64"], errors


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("ep=2,tp=2", marks=pytest.mark.slow),
        pytest.param("dp_shard=2", marks=pytest.mark.slow),
        pytest.param("pp=2,tp=2,sequence_parallel=false", marks=pytest.mark.slow),
        pytest.param("dp_shard=2,ep=2,tp=2", marks=pytest.mark.slow),
        "ep=2,expert_placement=round_robin",
    ],
)
def test_a_mesh_with_half_of_a_frozen_towers_features_kept(world, tmp_path, mesh):
    """Some ranks have pictures to compute, others have none left, and all take part. The files have
    the names that one process gives them, also where the tower's experts have moved."""
    settings = OMNI | {"training.freeze": "vision", "training.attention_dropout": "0.1"}
    settings |= {"moe.vision.router": "topk", "moe.vision.capacity_factor": "0"}
    if "placement" not in mesh:
        settings = {k: v for k, v in settings.items() if not k.startswith("moe.vision")}
    words = small_words(tmp_path) + [w for k, v in settings.items() for w in (f"--{k}", v)]
    words += ["--run.device", "cpu", "--training.dtype", "float64", "--training.steps", "2"]
    ranks, changes = ranks_and_words(mesh)
    rows = ["--training.micro_batch_size", str(joint_micro_batch(words, changes))]
    single = record([*words, *rows, "--run.output_dir", str(tmp_path / "single")])
    cache = tmp_path / "cache"
    words += ["--data.feature_cache", str(cache)]
    record([*words, *rows, "--run.output_dir", str(tmp_path / "fill")])
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    kept = set(files[::2])
    for path in set(files) - kept:
        path.unlink()
    trace = world.run(ranks, record, [*words, *changes, "--run.output_dir", str(tmp_path / "m")])[0]
    errors = compare(trace, single)
    kinds = set(judged("float64")) - {"loads", "routing"}  # of the tower: computed pictures only
    assert max(errors[kind][0] for kind in kinds) <= LIMITS["float64"], errors
    assert {path for path in cache.rglob("*") if path.is_file()} == set(files)
