"""The trainer as a user runs it: one command, killed, resumed, finished, mistaken."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import pytest
import torch
import torch.distributed as dist

from tests.small_run import curve, run, run_killed, small_config, weights
from titan_vlm import train
from titan_vlm.assembly import assemble, build_model, export, fill
from titan_vlm.config import load_config
from titan_vlm.errors import ConfigError
from titan_vlm.parallelize import count_microbatches

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "cc12m-train-0000.tar"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__num_workers": "2", "checkpoint__async_save": "true"},
        {"training__dtype": "bfloat16"},
    ],
    ids=["plain", "workers and async save", "bfloat16"],
)
def test_a_killed_run_resumes_bitwise(tmp_path, changes):
    assert run(tmp_path / "whole", **changes) == 0
    run_killed(tmp_path / "killed", step=4, **changes)
    assert run(tmp_path / "killed", **changes) == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    resumed, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_finished_run_says_so_and_trains_nothing(tmp_path, monkeypatch, caplog):
    assert run(tmp_path, training__steps="2") == 0
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("trained again"))
    with caplog.at_level("INFO"):
        assert run(tmp_path, training__steps="2") == 0
    assert "this run is finished: step 2 of 2" in caplog.text


def test_accumulation_does_not_change_the_mathematics(tmp_path):
    one = {"training__dtype": "float64", "training__global_batch_size": "4"}
    assert run(tmp_path / "four", **one, training__micro_batch_size="1") == 0
    assert run(tmp_path / "one", **one, training__micro_batch_size="4") == 0
    for ours, theirs in zip(curve(tmp_path / "four"), curve(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_the_log_says_where_the_weights_come_from(tmp_path, caplog):
    config = small_config(tmp_path, run__seed="3")
    parts = assemble(config)

    def told(config, fresh=True):
        caplog.clear()
        model = build_model(parts, config)
        with caplog.at_level("INFO"):
            fill(model, parts, config, torch.device("cpu"), fresh)
        return model, [line for line in caplog.messages if line.startswith("weights:")]

    model, lines = told(config)
    assert lines == ["weights: random, seed 3"]
    export(parts, model.state_dict(), tmp_path / "hf", "float32")
    start = small_config(tmp_path, checkpoint__initial_load_path=str(tmp_path / "hf"))
    assert told(start)[1] == [f"weights: from {tmp_path / 'hf'}"]
    assert told(start, fresh=False)[1] == []  # they are about to come from a checkpoint


def test_a_frozen_branch_stays_and_the_others_learn(tmp_path):
    assert run(tmp_path / "all", training__steps="1", schedule__warmup_steps="0") == 0
    start = tmp_path / "all" / "hf"
    changes = {"training__freeze": '["vision"]', "checkpoint__initial_load_path": str(start)}
    assert run(tmp_path / "frozen", training__steps="2", **changes) == 0
    before, after = weights(tmp_path / "all"), weights(tmp_path / "frozen")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    vision = {n for n in before if ".visual." in n and "merger" not in n}
    assert vision and not moved & vision
    assert {n for n in before if ".language_model." in n and "proj" in n} <= moved


def test_a_branch_learns_at_its_own_rate(tmp_path, monkeypatch):
    assert run(tmp_path / "all", training__steps="1", schedule__warmup_steps="0") == 0
    changes = {
        "optimizer__branch_lr": "{ projector = 0.0, vision = 1e-2 }",
        "checkpoint__initial_load_path": str(tmp_path / "all" / "hf"),
        "schedule__kind": "constant",
        "schedule__warmup_steps": "2",  # the first step is taken at half the rate
        "training__steps": "2",
        "checkpoint__every": "0",
    }
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", only_the_first(train.train_step))
        assert run(tmp_path / "rates", **changes) == 0
    before, after = weights(tmp_path / "all"), weights(tmp_path / "rates")
    change = {name: (after[name] - before[name]).abs().max().item() for name in before}
    projector = [change[name] for name in change if "merger" in name]
    vision = [change[n] for n in change if ".visual." in n and "merger" not in n]
    text = [change[name] for name in change if ".language_model.layers" in name]
    assert max(projector) == 0.0
    # Adam's first step moves a weight by its rate, whatever the gradient.
    assert max(vision) == pytest.approx(1e-2 / 2, rel=0.1)
    assert max(text) == pytest.approx(load_config("qwen_vlm_moe.toml").optimizer.lr / 2, rel=0.1)


def only_the_first(train_step):
    """The step, which later does nothing."""

    def step(state, metrics):
        if state.step == 0:
            train_step(state, metrics)
        else:
            state.step += 1

    return step


def test_loads_count_the_pairs_of_the_steps_since_the_last_report(tmp_path):
    prepared = train.prepare(small_config(tmp_path))
    reports = Reports()
    for _ in range(3):
        train.train_step(prepared, reports)
    dist.destroy_process_group()
    assert len(reports.pairs) == 3
    assert reports.pairs == [tokens * 2 for tokens in reports.tokens]  # top-2


class Reports:
    """The part of MetricsLogger that a step calls; keeps pairs and tokens of each step."""

    def __init__(self):
        self.pairs, self.tokens = [], []

    def waiting_for_data(self):
        return nullcontext()

    def count(self, tokens, **_):
        self.tokens.append(tokens)

    def due(self, step):
        return True

    def end_step(self, step, *, expert_loads, **_):
        sums = {int(load_E.sum()) for load_E in expert_loads.values()}
        assert len(sums) == 1  # each MoE layer routes the same tokens
        self.pairs.append(sums.pop())


def test_a_run_ends_with_a_validation(tmp_path):
    assert run(tmp_path, training__steps="2") == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (validation,) = [record for record in records if "eval/exact" in record]
    assert validation["step"] == 2
    assert 0 <= validation["eval/exact"] <= 1 and validation["eval/loss"] > 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiling_changes_no_number(tmp_path, backend):
    exact = {"training__dtype": "float64", "training__steps": "2"}
    assert run(tmp_path / "plain", **exact) == 0
    assert (
        run(tmp_path / "compiled", **exact, compile__enable="true", compile__backend=backend) == 0
    )
    for ours, theirs in zip(curve(tmp_path / "compiled"), curve(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-11)


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason="needs the photographs of shared/data")
def test_photographs_and_captions_are_learned_in_little_memory(tmp_path):
    command = [sys.executable, "-m", "titan_vlm.train", "--config", "cc12m_debug.toml"]
    settings = ["--data.path", str(PHOTOGRAPHS), "--run.output_dir", str(tmp_path)]
    subprocess.run([*command, *settings], check=True)
    losses = [loss for _, loss, _ in curve(tmp_path)]
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]
    assert getrusage(RUSAGE_CHILDREN).ru_maxrss < 6 * 2**20  # KiB


@pytest.mark.parametrize("mode", ["full", "selective", "layers"])
def test_activation_checkpointing_changes_no_number(tmp_path, mode):
    exact = {"training__dtype": "float64", "training__steps": "2"}
    assert run(tmp_path / "none", **exact) == 0
    assert run(tmp_path / mode, **exact, activation_checkpoint__mode=mode) == 0
    for ours, theirs in zip(curve(tmp_path / mode), curve(tmp_path / "none"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__flavor": "debug_mow"}, "debug_moe"),
        ({"model__flavor": "hf", "model__hf_path": "nowhere"}, "nowhere"),
        ({"data__tokenizer": "nowhere"}, "data.tokenizer"),
        ({"data__source": "llava", "data__path": "none.jsonl"}, "none.jsonl"),
        ({"data__source": "webdataset", "data__path": "none.tar"}, "none.tar"),
        ({"data__virtual_shards": "3", "data__num_workers": "2"}, "data.virtual_shards"),
        ({"training__freeze": '["visoin"]'}, "'vision'"),
        ({"checkpoint__initial_load_path": "nowhere"}, "nowhere"),
        ({"training__global_batch_size": "3", "training__micro_batch_size": "2"}, "multiple"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capfd, changes, said):
    assert run(tmp_path, **changes) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert said in errors[0]


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capfd):
    assert run(tmp_path, training__steps="2") == 0
    before = (tmp_path / "config.toml").read_text()
    assert run(tmp_path, training__steps="4", model__flavor="debug") == 2
    assert "checkpoint of another model" in capfd.readouterr().err
    assert (tmp_path / "config.toml").read_text() == before


SIGN, QUANTILE = ({"moe__text__bias_update": kind} for kind in ("sign", "quantile"))
THRESHOLD = {"moe__text__router": "threshold"}


@pytest.mark.parametrize(
    ("saved", "set_now", "said"),
    [
        (SIGN, {}, 'bias_E is only there, of a run with bias_update = "sign" or "quantile"'),
        ({}, SIGN, 'bias_E is not in it, which bias_update = "sign" or "quantile" needs'),
        ({}, THRESHOLD, 'threshold_E is not in it, which router = "threshold" needs'),
        (THRESHOLD, QUANTILE, 'bias_E is not in it, which bias_update = "sign" or "quantile"'),
    ],
)
def test_a_checkpoint_of_other_balancing_names_the_buffer_and_what_to_do(
    tmp_path, capfd, saved, set_now, said
):
    kept = {"checkpoint__export_hf": "false"}
    assert run(tmp_path, training__steps="2", **saved, **kept) == 0
    assert run(tmp_path, training__steps="4", **set_now, **kept) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    assert "other balancing of experts: text.layers.1.moe.router.steering." in line
    assert said in line and "another run.output_dir" in line
    assert "another model" not in line


def test_a_batch_that_ranks_do_not_divide_is_refused_with_the_nearest():
    config = load_config("qwen_vlm_moe.toml", ["--training.micro_batch_size", "2"])
    degrees = {"dp_replicate": 1, "dp_shard": 3, "ep": 1, "tp": 1}
    with pytest.raises(ConfigError, match="use 6 or 12$"):
        count_microbatches(config, degrees)
    config = load_config("qwen_vlm_moe.toml", ["--training.micro_batch_size", "8"])
    degrees["dp_shard"] = 2
    with pytest.raises(ConfigError, match="use 16, or training.micro_batch_size = 4$"):
        count_microbatches(config, degrees)


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [train.REFUSAL_S])])
def test_a_mistake_is_said_by_the_rank_that_is_seen(tmp_path, monkeypatch, rank, waits):
    """torchrun kills the others as soon as one ends, and shows the output of rank 0 alone."""
    slept = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(train.time, "sleep", slept.append)
    assert run(tmp_path, model__flavor="none") == 2
    assert slept == waits
