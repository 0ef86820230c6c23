"""A run in stages is the runs by hand, also when it is killed; and what a border keeps."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from scripts import convert
from tests.curriculum_run import STAGES, assert_is, by_hand, in_stages, stages_toml
from tests.small_run import Silent, curve, run, run_killed, small_config
from titan_vlm import events, train
from titan_vlm.assembly import assemble
from titan_vlm.config import load_config
from titan_vlm.data.images import visual_spec
from titan_vlm.data.ledger import read_ledger
from titan_vlm.data.loader import build_loader
from titan_vlm.models.moe.layer import moe_layers
from titan_vlm.stages import next_stage
from titan_vlm.training.curriculum import last_config


@pytest.fixture(autouse=True)
def no_group_is_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    return by_hand(tmp_path_factory.mktemp("hand"))


def test_a_run_in_stages_is_the_runs_by_hand(hand, tmp_path):
    assert run(tmp_path, **in_stages()) == 0
    assert_is(tmp_path, hand)
    lengths = hand[2]
    told = [(e["step"], e["stage"]) for e in events.read(tmp_path) if e["kind"] == "stage"]
    assert told == [(0, "align"), (lengths[0], "all"), (sum(lengths[:2]), "tune")]
    rates = rates_of(tmp_path)
    assert rates[0]["lr/base"] == rates[1]["lr/base"] == 2e-3  # constant
    assert rates[2]["lr/vision"] == pytest.approx(5e-4)  # from its peak again
    assert sorted(rates[-1]) == ["lr/base"]


@pytest.mark.parametrize(
    "stops", [("inside", "border"), pytest.param(("border", "inside"), marks=pytest.mark.slow)]
)
def test_killed_inside_a_stage_or_on_a_border_it_goes_on_as_if_nothing_was(hand, tmp_path, stops):
    first, second, _ = hand[2]
    places = {"border": (first, first + second), "inside": (first - 1, first + second - 1)}
    for number, stop in enumerate(stops):
        run_killed(tmp_path, step=places[stop][number], **in_stages())
    assert run(tmp_path, **in_stages(data__num_workers="2")) == 0
    assert_is(tmp_path, hand)


def rates_of(output):
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: x for k, x in r.items() if k.startswith("lr/")} for r in records if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_in_bfloat16_with_recomputation_a_resumed_run_has_the_same_bits(tmp_path, compiled):
    changes = in_stages(
        training__dtype="bfloat16",
        activation_checkpoint__mode="full",
        checkpoint__async_save="true",
        compile__enable=str(compiled).lower(),
        compile__backend="eager",
        curriculum__stages=stages_toml([(s[0], "steps", n, s[3]) for n, s in enumerate(STAGES, 1)]),
    )
    assert run(tmp_path / "whole", **changes) == 0
    run_killed(tmp_path / "killed", step=3, **changes)  # after the border, of which it is saved
    assert run(tmp_path / "killed", **changes) == 0
    assert len(curve(tmp_path / "whole")) == 6
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


def test_a_checkpoint_of_a_stage_that_is_gone_is_refused(tmp_path, capsys):
    run_killed(tmp_path, step=1, **in_stages())
    renamed = stages_toml([("other", *stage[1:]) for stage in STAGES[:1]])
    assert run(tmp_path, **in_stages(curriculum__stages=renamed)) == 2
    said = capsys.readouterr().err
    assert (
        'the checkpoint of step 1 is of the stage "align", and the stages now are "other"' in said
    )


def test_layers_that_learned_cannot_be_put_to_sleep_in_a_run_that_goes_on(tmp_path, capsys):
    stages = [("a", "steps", 2, {"moe.text.asleep": "[1]"}), ("b", "steps", 1, {})]
    run_killed(tmp_path, step=1, **in_stages(curriculum__stages=stages_toml(stages)))
    stages[0][3]["moe.text.asleep"] = "[1, 2]"
    assert run(tmp_path, **in_stages(curriculum__stages=stages_toml(stages))) == 2
    said = 'error: curriculum.stages ("a"): moe.text.asleep: layer 2 was awake in the run to resume'
    assert said in capsys.readouterr().err
    stages[0][3]["moe.text.asleep"] = "[1]"
    assert run(tmp_path, **in_stages(curriculum__stages=stages_toml(stages))) == 0


def test_the_last_step_of_each_stage_is_reported(tmp_path):
    stages = [("a", "steps", 2, {}), ("b", "steps", 1, {}), ("c", "samples", 5, {})]
    changes = in_stages(curriculum__stages=stages_toml(stages), metrics__log_every="100")
    assert run(tmp_path, **changes) == 0
    assert [step for step, _, _ in curve(tmp_path)] == [2, 3]


def test_a_finished_run_goes_on_in_a_stage_that_is_added(hand, tmp_path):
    assert run(tmp_path, **in_stages(curriculum__stages=stages_toml(STAGES[:2]))) == 0
    assert run(tmp_path, **in_stages()) == 0
    assert_is(tmp_path, hand)


def test_an_export_is_of_the_stage_that_its_weights_are_in(tmp_path):
    stages = stages_toml(
        [("a", "steps", 1, {"moe.text.top_k": "1"}), ("b", "steps", 1, {"moe.text.top_k": "3"})]
    )
    changes = in_stages(curriculum__stages=stages, checkpoint__export_hf="true")
    assert run(tmp_path, **changes) == 0
    assert experts_of_a_token(tmp_path / "hf") == 3
    for step in (1, 2):
        source = tmp_path / "checkpoints" / f"step-{step:06d}"
        assert convert.main([str(source), str(tmp_path / f"{step}")]) == 0
        assert experts_of_a_token(tmp_path / f"{step}") == (1, 3)[step - 1]
    assert last_config(load_config(str(tmp_path / "config.toml"))).moe.text.top_k == 3


def experts_of_a_token(folder):
    return json.loads((folder / "config.json").read_text())["text_config"]["num_experts_per_tok"]


# ---------------------------------------------------------------------------- borders


def in_training(output, stages, **changes):
    """A run at the end of the first of its stages."""
    state = train.prepare(
        small_config(output, **in_stages(curriculum__stages=stages_toml(stages), **changes))
    )
    while not state.stage_is_over:
        train.train_step(state, Silent())
    return state


def test_the_optimizer_keeps_what_goes_on_and_knows_nothing_of_what_is_thawed(tmp_path):
    stages = [
        ("a", "steps", 2, {"training.freeze": '["vision"]'}),
        ("b", "steps", 1, {"training.freeze": '["projector"]'}),
    ]
    state = in_training(tmp_path, stages)
    branches = {name: b for b, names in state.model.branches().items() for name in names}
    before = {name: dict(state.optimizer.state[p]) for name, p in state.model.named_parameters()}
    tensors = {name: p.data_ptr() for name, p in state.model.named_parameters()}
    next_stage(state)
    for name, parameter in state.model.named_parameters():
        assert parameter.data_ptr() == tensors[name], f"{name} was copied"
        now = state.optimizer.state.get(parameter, {})
        assert bool(now) == (branches[name] == "text"), name
        assert all(now[key] is before[name][key] for key in now)
    train.train_step(state, Silent())
    steps = {
        branch: {
            float(state.optimizer.state[p]["step"])
            for name, p in state.model.named_parameters()
            if branches[name] == branch and p in state.optimizer.state
        }
        for branch in ("text", "vision", "projector")
    }
    assert steps == {"text": {3.0}, "vision": {1.0}, "projector": set()}


def test_a_frozen_branch_has_no_gradient_and_no_state(tmp_path):
    state = in_training(tmp_path, [("a", "steps", 1, {"training.freeze": '["vision", "text"]'})])
    graded = []
    state.optimizer.register_step_pre_hook(
        lambda *_: graded.extend(n for n, p in state.model.named_parameters() if p.grad is not None)
    )
    state.stages.append(state.stage)
    train.train_step(state, Silent())
    trained = {n for n, p in state.model.named_parameters() if p in state.optimizer.state}
    assert trained == set(graded) == set(state.model.branches()["projector"])


def test_waking_experts_changes_nothing_at_the_border(tmp_path):
    stages = [
        ("dense", "steps", 2, {"moe.text.asleep": "[1, 3]"}),
        ("awake", "steps", 1, {"moe.text.asleep": "[3]"}),
    ]
    state = in_training(tmp_path, stages)
    layer = moe_layers(state.model)["text.layers.1"]
    assert not torch.equal(layer.experts.down[0], layer.experts.down[1])
    moments = {name: s["exp_avg"].clone() for name, s in states_of(state, "layers.1.moe.experts")}
    batch, seen = some_batch(state), outputs(state)
    assert state.optimizer.state.get(layer.router.weight, {}) == {}  # it was not asked
    next_stage(state)
    layer = moe_layers(state.model)["text.layers.1"]
    assert not layer.router.asleep and moe_layers(state.model)["text.layers.3"].router.asleep
    for parameter in layer.experts.parameters():
        assert all(torch.equal(expert, parameter[0]) for expert in parameter)
    for name, now in states_of(state, "layers.1.moe.experts"):
        assert torch.equal(now["exp_avg"], moments[name][:1].expand_as(moments[name]))
        assert moments[name][0].any() and not moments[name][1].any()
    torch.testing.assert_close(outputs(state, batch), seen, rtol=1e-12, atol=1e-12)
    train.train_step(state, Silent())
    assert not torch.equal(layer.experts.down[0], layer.experts.down[1])


def states_of(state, part):
    for name, parameter in state.model.named_parameters():
        if part in name:
            yield name, state.optimizer.state[parameter]


def some_batch(state):
    from titan_vlm.data.rows import collate

    row = next(train.build_loader(state.config, state.parts.tokenizer, state.parts.images))
    return collate([row])


def outputs(state, batch=None):
    with torch.no_grad():
        state.model.eval()
        logits = state.model(batch or some_batch(state))
        state.model.train()
    return logits


def test_layers_that_sleep_send_all_to_expert_0_with_weight_1(tmp_path):
    state = in_training(tmp_path, [("dense", "steps", 1, {"moe.text.asleep": "[1, 2, 3]"})])
    batch = some_batch(state)
    before = outputs(state, batch)
    with torch.no_grad():
        for layer in moe_layers(state.model).values():
            layer.router.weight.normal_()
            for parameter in layer.experts.parameters():
                parameter[1:] = 0
    assert torch.equal(outputs(state, batch), before)
    for layer in moe_layers(state.model).values():
        load_E = layer.router.load_E
        assert load_E[0] > 0 and not load_E[1:].any()


def test_sources_come_in_the_shares_of_their_stage(tmp_path):
    sources = (
        '[{name = "a", source = "digits", weight = 1.0}, '
        '{name = "b", source = "digits", weight = 1.0}]'
    )
    stages = [
        ("first", "samples", 60, {"data.sources.b.off": "true"}),
        ("second", "samples", 400, {"data.sources.b.weight": "3"}),
    ]
    changes = {"curriculum__stages": stages_toml(stages), "training__dtype": "float32"}
    changes |= {"data__sources": sources, "training__global_batch_size": "16"}
    changes |= {"checkpoint__every": "0", "metrics__log_every": "100"}
    assert run(tmp_path, **in_stages(**changes)) == 0
    ids = [
        [id for row in step.rows for id in row] for _, step in sorted(read_ledger(tmp_path).items())
    ]
    border = next(e["step"] for e in events.read(tmp_path) if e.get("number") == 2)
    first, second = sum(ids[:border], []), sum(ids[border:], [])
    assert len(set(first + second)) == len(first + second)
    assert {id[0] for id in first} == {"a"}
    # What waited in the four windows at the border is of the first stage.
    share = sum(id.startswith("b") for id in second) / len(second)
    waited = 16 / len(second)
    assert 0.75 * (1 - waited) - 0.02 <= share <= 0.75


@pytest.mark.parametrize(("overlong", "workers"), [("drop", 0), ("cut", 0), ("drop", 2)])
def test_at_a_border_every_sample_is_used_once_or_named_as_left_out(tmp_path, overlong, workers):
    config = small_config(tmp_path, **in_stages(data__overlong=overlong, curriculum__stages="[]"))
    config = replace(config, data=replace(config.data, num_workers=workers, ledger=False))
    parts, rows, opened, loader = assemble(config), [], None, None
    for seq_len, min_pixels in ((256, 1024), (40, 16384), (96, 1024)):
        own = replace(
            config,
            training=replace(config.training, seq_len=seq_len),
            data=replace(config.data, min_pixels=min_pixels),
        )
        images = visual_spec(own.data, **parts.spec.visual(parts.dims))
        following = build_loader(own, parts.tokenizer, images, opened=opened)
        if loader is not None:
            following.go_on_from(loader)
        loader, opened = following, following.rows.mixture
        rows += [next(loader) for _ in range(8)]
        assert all(len(row.tokens_S) == seq_len for row in rows[-8:])
    state = loader.state_dict()
    loader.close()
    fates = [id for row in rows for id in (*row.sample_ids, *row.skipped)]
    waiting = [
        opened.id(member, position)
        for shard in state["shards"].values()
        for member, position in shard["pending"]
    ]
    read = [
        opened.id(0, position)
        for number, shard in state["shards"].items()
        for position in range(number, shard["cursors"][0], config.data.virtual_shards)
    ]
    assert sorted(fates + waiting) == sorted(read)
    left_out = sum(len(row.skipped) for row in rows)
    assert loader.counts.dropped == left_out and loader.counts.seen == len(read)
    assert loader.counts.cut if overlong == "cut" else left_out


def test_a_roll_back_over_a_border_goes_back_to_the_stage_of_its_checkpoint(tmp_path):
    stages = [("a", "steps", 2, {"training.freeze": '["vision"]'}), ("b", "steps", 9, {})]
    state = in_training(tmp_path, stages)
    train.save(state)
    weights = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    next_stage(state)
    train.train_step(state, Silent())
    state.guard.state.streak = [{"step": 3, "why": "a test", "rows": (8, 12), "samples": []}]
    train.roll_back(state)
    assert (state.step, state.stage.name, state.place.stage) == (2, "a", "a")
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.requires_grad == (name not in state.model.branches()["vision"])
    next_stage(state)
    train.train_step(state, Silent())
    assert state.stage.name == "b"
