"""Steps that go wrong, in one process: skipped, rolled back, remembered; and what is said."""

import json
import math
import random

import numpy as np
import pytest
import torch.distributed as dist

from tests.faults.bad_steps import (
    SPOILS,
    STEERED,
    Listener,
    assert_same,
    by_hand,
    final_state,
    guarded,
    leave_out,
    records,
    rows_changed,
    spoil_pixels,
    spoiled_steps,
    state_of,
)
from tests.small_run import curve, run, run_killed
from titan_vlm import train
from titan_vlm.config import Guards, load_config
from titan_vlm.errors import ConfigError, NumericsError
from titan_vlm.training import guards
from titan_vlm.training.guards import Guard, Signals, robust_z


@pytest.fixture(autouse=True)
def no_group_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# Steps of two rows: step n has rows 2n - 2 and 2n - 1.
SKIPS = STEERED | {"guards__max_skips": "2", "training__steps": "8"}


@pytest.mark.parametrize("kind", SPOILS)
def test_a_skipped_step_leaves_no_trace_but_in_the_count(tmp_path, kind):
    """Weights, moments, biases, counters: as in a run by hand that leaves the update out."""
    told = []
    with spoiled_steps(kind, {2, 5}, rank=0), Listener() as heard:
        ours = guarded(tmp_path / "ours", STEERED, 5, lambda k, **facts: told.append((k, facts)))
    assert ours.step == 5 and ours.guard.counts()["skipped_steps"] == 2
    ours_state = state_of(ours)
    dist.destroy_process_group()
    theirs = by_hand(tmp_path / "theirs", STEERED, {2, 5}, 5)
    assert_same(ours_state, state_of(theirs))
    assert ours.loader.state_dict() == theirs.loader.state_dict()
    dist.destroy_process_group()
    assert [(k, facts["step"]) for k, facts in told] == [("skip", 2), ("skip", 5)]
    said = {"gradient": "gradient norm is nan", "loss": "loss is inf", "router": "router logits"}
    assert said[kind] in told[0][1]["why"] and said[kind] in heard.said[0]
    samples = told[0][1]["samples"]
    assert samples and all(name.startswith("digits:") for name in samples)
    assert (
        f"step 2 is skipped (1 in a row): {told[0][1]['why']}; samples: {samples[0]}"
        in (heard.said[0])
    )


def test_the_run_goes_on_after_a_sample_whose_pixels_are_no_numbers(tmp_path, capsys):
    with rows_changed(spoil_pixels({4})):
        assert run(tmp_path / "ours", **STEERED) == 0
    assert "loss     nan" in capsys.readouterr().out
    lines = records(tmp_path / "ours")
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
    assert [r["guards/skipped_steps"] for r in lines] == [0, 0, 1, 1, 1, 1]
    assert [r["loss"] is None for r in lines] == [False, False, True, False, False, False]
    assert "NaN" not in (tmp_path / "ours" / "metrics.jsonl").read_text()
    experts = [any(key.startswith("experts/") for key in r) for r in lines]
    assert experts == [True, True, False, True, True, True]
    theirs = state_of(by_hand(tmp_path / "theirs", STEERED, {3}, 6))
    dist.destroy_process_group()
    ours = final_state(tmp_path / "ours", **STEERED)
    weights = [name for name in theirs if ".sums" not in name and ".load" not in name]
    assert_same(*({name: of[name] for name in weights} for of in (ours, theirs)))


def test_a_rollback_gives_the_run_whose_data_never_had_these_rows(tmp_path, capsys):
    """Steps 5 and 6 (rows 8 to 11) are bad, the checkpoint is of step 3."""
    with rows_changed(spoil_pixels({8, 9, 10, 11})), Listener() as heard:
        assert run(tmp_path / "ours", **SKIPS) == 0
    with rows_changed(leave_out({8, 9, 10, 11})):
        assert run(tmp_path / "theirs", **SKIPS) == 0
    assert curve(tmp_path / "ours") == curve(tmp_path / "theirs")
    ours, theirs = (final_state(tmp_path / name, **SKIPS) for name in ("ours", "theirs"))
    assert_same(ours, theirs)
    last = records(tmp_path / "ours")[-1]
    assert (last["guards/passed_rows"], last["guards/rollbacks"]) == (4, 1)
    assert "rows passed over 4" in capsys.readouterr().out
    rolled = [text for text in heard.said if text.startswith("rolled back to step 3: 2 steps")]
    assert len(rolled) == 1 and "the rows of steps 5 to 6 will be passed over" in rolled[0]
    assert any(text.startswith("passed over 4 rows: digits:") for text in heard.said)


def test_the_same_with_loader_processes_and_saves_in_the_background(tmp_path):
    changes = SKIPS | {"data__num_workers": "2", "checkpoint__async_save": "true"}
    with rows_changed(spoil_pixels({6, 8, 9})):  # the first step after the checkpoint
        assert run(tmp_path / "ours", **changes) == 0
    with rows_changed(leave_out({6, 7, 8, 9})):
        assert run(tmp_path / "theirs", **changes) == 0
    assert curve(tmp_path / "ours") == curve(tmp_path / "theirs")


def test_a_run_killed_after_the_rollback_passes_over_the_same_rows(tmp_path):
    """Though nothing is wrong with them any more when it is resumed."""
    changes = SKIPS | {"checkpoint__every": "4"}
    whole, killed = train.train_step, []

    def kill(state, metrics):
        if state.guard.state.rollbacks and state.step == 5:
            killed.append(state.checkpointer.history.latest())
            raise KeyboardInterrupt
        whole(state, metrics)

    with pytest.MonkeyPatch.context() as patch, spoiled_steps("loss", {6, 7}, 0, once=True):
        patch.setattr(train, "train_step", kill)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "ours", **changes)
    assert killed == [5]  # saved after the first good step, before the bad rows come
    with Listener() as heard:
        assert run(tmp_path / "ours", **changes) == 0
    assert any(text.startswith("passed over 4 rows") for text in heard.said)
    with rows_changed(leave_out({10, 11, 12, 13})):
        assert run(tmp_path / "theirs", **changes) == 0
    assert curve(tmp_path / "ours") == curve(tmp_path / "theirs")
    assert records(tmp_path / "ours")[-1]["guards/rollbacks"] == 1


def test_what_is_due_while_steps_are_skipped_is_saved_after_the_next_good_one(tmp_path):
    with spoiled_steps("loss", {3, 4}, rank=0):
        assert run(tmp_path, **(SKIPS | {"guards__max_skips": "3"})) == 0
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-000006", "step-000008"]  # two are kept
    with spoiled_steps("loss", {2, 3}, rank=0):
        changes = SKIPS | {"guards__max_skips": "3", "checkpoint__keep_latest_k": "0"}
        assert run(tmp_path / "other", **changes) == 0
    names = sorted(path.name for path in (tmp_path / "other" / "checkpoints").glob("step-*"))
    assert names == ["step-000004", "step-000006", "step-000008"]


@pytest.mark.parametrize(
    ("changes", "steps", "said"),
    [
        (
            {"guards__max_skips": "0"},
            {2},
            "error: step 2: loss is inf; the weights are still those of step 1; last good "
            "checkpoint: there is none; try a lower optimizer.lr, a smaller training.max_norm, or "
            "the data without some of these samples: digits:",
        ),
        (
            {},
            {2, 3},
            "2 steps in a row are bad (guards.max_skips = 2): step 2: loss is inf; step 3: loss is "
            "inf; the weights are still those of step 1; last good checkpoint: there is none to "
            "roll back to (checkpoint.every); try",
        ),
        (
            {},
            {5, 6, 7, 8},
            "2 steps in a row are bad again, after a rollback (guards.max_skips = 2): step 5: loss "
            "is inf; step 6: loss is inf; the weights are still those of step 4; last good "
            "checkpoint: it is of step 4; try",
        ),
    ],
    ids=["never skip", "no checkpoint", "again"],
)
def test_where_there_is_no_way_back_the_run_says_what_went_wrong(
    tmp_path, capfd, changes, steps, said
):
    with spoiled_steps("loss", steps, rank=0):
        assert run(tmp_path, **(SKIPS | changes)) == 2
    errors = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(errors) == 1 and said in errors[0] and "digits:" in errors[0]


def test_another_rollback_needs_a_checkpoint_that_was_due_in_between(tmp_path):
    """Rows 8 to 11 are bad and rows 20 to 23: the second rollback goes to step 6."""
    changes = SKIPS | {"training__steps": "12"}
    with rows_changed(spoil_pixels({8, 10, 20, 22})), Listener() as heard:
        assert run(tmp_path / "ours", **changes) == 0
    rolled = [text.split(":")[0] for text in heard.said if text.startswith("rolled back")]
    assert rolled == ["rolled back to step 3", "rolled back to step 6"]
    with rows_changed(leave_out({8, 9, 10, 11, 20, 21, 22, 23})):
        assert run(tmp_path / "theirs", **changes) == 0
    assert curve(tmp_path / "ours") == curve(tmp_path / "theirs")


def test_one_good_step_in_between_is_no_reason_for_another(tmp_path, capfd):
    """Rows 6 to 9 send the run back to step 3; step 4 is good and saved, steps 5 and 6 are bad."""
    with rows_changed(spoil_pixels({6, 8, 12, 14})):
        assert run(tmp_path, **SKIPS) == 2
    said = capfd.readouterr().err
    assert "2 steps in a row are bad again, after a rollback" in said
    assert "last good checkpoint: it is of step 4" in said


# ---------------------------------------------------------------------------- spikes


def naive_z(value, history):
    def middle(numbers):
        ordered, half = sorted(numbers), len(numbers) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    centre = middle(history)
    return (value - centre) / (1.4826 * middle([abs(x - centre) for x in history]))


def test_the_robust_score_is_that_of_the_definition():
    for seed in range(50):
        numbers = np.random.default_rng(seed).standard_cauchy(20 + seed).tolist()
        value = numbers.pop()
        assert robust_z(value, numbers) == pytest.approx(naive_z(value, numbers), rel=1e-12)
    normal = np.random.default_rng(0).normal(5.0, 2.0, 20001).tolist()
    assert robust_z(11.0, normal) == pytest.approx(3.0, rel=0.03)  # sigmas
    assert robust_z(7.0, [1.0] * 30 + [2.0] * 10) == 0.0  # nothing to measure by


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def series(length, seed):
    """A falling loss with noise and some jumps upwards."""
    chance = random.Random(seed)
    return [
        3 * math.exp(-n / 80)
        + chance.gauss(0, 0.05)
        + (chance.random() < 0.06) * 2 * chance.random()
        for n in range(length)
    ]


@pytest.mark.parametrize("on_spike", ["warn", "skip"])
@pytest.mark.parametrize("window", [20, 60])
def test_spikes_are_found_where_a_naive_computation_finds_them(alone, on_spike, window):
    losses, norms = series(300, 1), series(300, 2)
    config = Guards(spike_zscore=6.0, spike_window=window, on_spike=on_spike, max_skips=1000)
    told = []
    guard = Guard(config, lambda kind, **facts: told.append((kind, facts["step"])))
    wanted, kept = [], []
    for step, pair in enumerate(zip(losses, norms, strict=True), start=1):
        good = guard.judge(step, Signals(*pair, []), [])
        spike = len(kept) >= 20 and any(
            naive_z(value, [x[i] for x in kept[-window:]]) > 6 for i, value in enumerate(pair)
        )
        if spike:
            wanted.append(("spike" if on_spike == "warn" else "skip", step))
        assert good == (not spike or on_spike == "warn")
        if good:
            kept.append(pair)
        if step % 50 == 0:  # killed and resumed
            state, guard = guard.state_dict(), Guard(config, guard.tell)
            guard.load_state_dict(state)
    assert told == wanted
    assert 10 < len(wanted) < 60


def test_nothing_is_a_spike_by_default_and_before_twenty_updates(alone):
    spiky = [2.0 + n % 3 for n in range(19)]
    for zscore, judged in ((0.0, [*spiky, 2.0, 1e9]), (5.0, [*spiky, 1e9])):
        guard = Guard(Guards(spike_zscore=zscore, on_spike="skip"))
        assert all(guard.judge(n, Signals(x, 1.0, []), []) for n, x in enumerate(judged))
    guard = Guard(Guards(spike_zscore=5.0, on_spike="skip"))
    assert all(guard.judge(n, Signals(x, 1.0, []), []) for n, x in enumerate([*spiky, 2.0]))
    assert not guard.judge(20, Signals(1e9, 1.0, []), [])
    assert guard.judge(21, Signals(-1e9, 1.0, []), [])  # only upwards


def test_a_spike_is_said_in_words(alone):
    guard = Guard(Guards(spike_zscore=5.0))
    with Listener() as heard:
        for n in range(30):
            guard.judge(n, Signals(2.0 + n % 3, 1.0 + n % 2, []), [])
        guard.judge(30, Signals(30.0, 1.0, []), [])
    (said,) = heard.said
    assert said.startswith(
        "step 30: loss 30 is a spike: 18.2 robust deviations above the median 3 of the last 30"
    )


def test_a_run_that_skips_spikes_resumes_with_the_same_decisions(tmp_path):
    """Steps 28 and 33 are spikes; step 25 was saved, and step 30 never came to its end."""
    changes = STEERED | {"training__steps": "34", "checkpoint__every": "25"}
    changes |= {"guards__spike_zscore": "25", "guards__on_spike": "skip"}
    with spoiled_steps("spike", {28, 33}, rank=0):
        assert run(tmp_path / "whole", **changes) == 0
        run_killed(tmp_path / "killed", 30, **changes)
        assert run(tmp_path / "killed", **changes) == 0
    skipped = [r["guards/skipped_steps"] for r in records(tmp_path / "whole")]
    assert skipped == [0] * 27 + [1] * 5 + [2] * 2
    assert [r["guards/skipped_steps"] for r in records(tmp_path / "killed")] == skipped
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--guards.on_spike", "skip"], "spike_zscore = 0"),
        (
            ["--guards.on_spike", "skip", "--guards.spike_zscore", "9", "--guards.max_skips", "0"],
            "",
        ),
        (["--guards.spike_window", "19"], "guards.spike_window: expected int >= 20"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, said):
    with pytest.raises(ConfigError, match="guards.on_spike: expected|spike_window") as refused:
        load_config("qwen_vlm_moe.toml", settings)
    assert said in str(refused.value)


def test_many_samples_are_named_in_part():
    names = [f"s{n}" for n in range(25)]
    assert guards._list(names).endswith("s18, s19 and 5 more")


def test_a_checkpoint_without_a_guard_is_resumed():
    guard = Guard(Guards())
    guard.load_state_dict(None)
    assert guard.counts() == {"skipped_steps": 0, "passed_rows": 0, "rollbacks": 0}
    state = json.loads(json.dumps(guard.state_dict()))
    guard.load_state_dict(state)
    guard.state.streak = [{"step": 3, "why": "loss is nan", "rows": (4, 6), "samples": ["a", "b"]}]
    with pytest.raises(NumericsError, match="samples: a, b$"):
        guard.check_rollback(None)
