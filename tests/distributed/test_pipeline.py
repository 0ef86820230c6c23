"""A pipeline as a user runs it: evaluated, saved, exported; and who gets what."""

import json
from dataclasses import replace

import pytest
import torch

from tests.distributed.test_data_parallel import EXACT, assert_same_curve, run_small
from tests.small_run import Silent, run, small_config, weights
from titan_vlm import train
from titan_vlm.models.omni.config import FLAVORS
from titan_vlm.models.omni.hf import to_hf

PP = {"parallelism__pp": "2", "training__global_batch_size": "4"}
OMNI = {
    "model__name": "omni",
    "model__flavor": "hf",
    "projector__levels": "1:0,2:2",
    "training__steps": "3",
    "moe__text__experts": "4",
    "moe__text__top_k": "2",
    "moe__text__expert_width": "24",
    "moe__text__score": "sigmoid",
    "moe__text__bias_update": "sign",
}
ZERO_BUBBLE = {"parallelism__pp_schedule": "ZBVZeroBubble"}


def evaluations(output):
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(r["eval/loss"], r["eval/exact"]) for r in records if "eval/loss" in r]


@pytest.mark.parametrize(
    ("ranks", "axes"),
    [
        (2, PP),
        (2, PP | ZERO_BUBBLE),
        pytest.param(4, PP | {"parallelism__tp": "2"}, marks=pytest.mark.slow),
    ],
    ids=["1F1B", "zero bubble in a V", "with tp"],
)
def test_a_run_is_the_single_process_run_to_the_export(world, tmp_path, ranks, axes):
    changes = EXACT | {"checkpoint__export_dtype": "float64", "eval__every": "3"}
    assert run(tmp_path / "one", **changes) == 0
    assert world.run(ranks, run_small, tmp_path / "mesh", changes | axes) == [0] * ranks
    assert_same_curve(tmp_path / "mesh", tmp_path / "one", rel=1e-9)
    found, wanted = (evaluations(tmp_path / name) for name in ("mesh", "one"))
    assert len(wanted) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    ours, theirs = weights(tmp_path / "mesh"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


def test_what_balances_the_experts_of_every_stage_is_exported(world, tmp_path):
    untied = to_hf(replace(FLAVORS["debug"], tie_embeddings=False), "float64")
    (tmp_path / "config.json").write_text(json.dumps(untied))
    changes = EXACT | OMNI | {"model__hf_path": str(tmp_path)}
    changes["checkpoint__export_dtype"] = "float64"
    assert run(tmp_path / "one", **changes) == 0
    assert world.run(2, run_small, tmp_path / "mesh", changes | PP) == [0, 0]
    ours, theirs = weights(tmp_path / "mesh"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    assert sum(name.endswith("bias_E") and bool(x.any()) for name, x in ours.items()) == 4
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


def test_bfloat16_learns_in_a_pipeline(world, tmp_path):
    changes = PP | {"training__dtype": "bfloat16", "schedule__warmup_steps": "0"}
    assert run(tmp_path / "one", **(changes | {"parallelism__pp": "1"})) == 0
    assert world.run(2, run_small, tmp_path / "mesh", changes) == [0, 0]
    assert_same_curve(tmp_path / "mesh", tmp_path / "one", rel=0.02)


def test_a_frozen_stage_takes_part(world, tmp_path):
    """The vision tower and the embedding, which are all of the first stage."""
    frozen = '["vision", "projector", "text.embed.*"]'
    changes = EXACT | {"training__freeze": frozen}
    assert run(tmp_path / "one", **changes) == 0
    split = {"parallelism__pp_split": "text.layers.0"}
    assert world.run(2, run_small, tmp_path / "mesh", changes | PP | split) == [0, 0]
    assert_same_curve(tmp_path / "mesh", tmp_path / "one", rel=1e-9)


def test_a_learning_rate_of_a_branch_on_another_stage(world, tmp_path):
    changes = EXACT | {"optimizer__branch_lr": "{ projector = 1e-2, 'lm_head.*' = 1e-3 }"}
    assert run(tmp_path / "one", **changes) == 0
    assert world.run(2, run_small, tmp_path / "mesh", changes | PP) == [0, 0]
    assert_same_curve(tmp_path / "mesh", tmp_path / "one", rel=1e-9)


def test_pixels_go_to_the_stage_of_the_vision_tower_only(world, tmp_path):
    found = world.run(2, patches_of_stages, tmp_path, PP | ZERO_BUBBLE)
    patches = found[0] | found[1]
    assert len(patches[0]) == 4 and all(patches[0])  # once for each micro-batch
    assert [set(patches[stage]) for stage in (1, 2, 3)] == [{0}] * 3


def patches_of_stages(output, changes):
    state = train.prepare(small_config(output, **changes))
    seen = {index: [] for index in state.pipeline.stages}
    for index, stage in state.pipeline.stages.items():
        stage.register_forward_pre_hook(
            lambda _, args, kwargs, i=index: seen[i].append(len(kwargs["batch"].pixels_NC)),
            with_kwargs=True,
        )
    train.train_step(state, Silent())
    return seen


def test_each_rank_has_its_stages_and_no_more(world, tmp_path):
    names = world.run(2, parameters_of_stages, tmp_path, PP | ZERO_BUBBLE)
    assert not names[0] & names[1]
    assert {"vision.patch_embed.weight", "text.embed.weight", "lm_head.weight"} <= names[0]
    assert "text.layers.0.attn.q.weight" in names[1]


def parameters_of_stages(output, changes):
    state = train.prepare(small_config(output, **changes))
    return {name for name, _ in state.model.named_parameters()}


def test_a_schedule_from_a_file(world, tmp_path):
    """GPipe on two ranks, written down."""
    rows = [
        ["0F0", "0F1", "0F2", "0F3", "0B0", "0B1", "0B2", "0B3"],
        ["1F0", "1F1", "1F2", "1F3", "1B0", "1B1", "1B2", "1B3"],
    ]
    file = tmp_path / "mine.csv"
    file.write_text("\n".join(",".join(row) for row in rows))
    assert run(tmp_path / "one", **EXACT) == 0
    changes = EXACT | PP | {"parallelism__pp_schedule": str(file)}
    assert world.run(2, run_small, tmp_path / "mesh", changes) == [0, 0]
    assert_same_curve(tmp_path / "mesh", tmp_path / "one", rel=1e-9)
