"""What is reported of MoE layers, against counts by hand."""

import json
import math

import pytest
import torch

from tests.small_run import run
from tests.unit.test_metrics import logger, records, step
from titan_vlm.models.init import init_weights
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.router import SUMS
from titan_vlm.models.moe.tokens import tokens_of
from titan_vlm.training.metrics import console_line
from titan_vlm.training.moe_log import STARVED_REPORTS, Warnings, branch_figures, layer_figures
from titan_vlm.training.routing import Figures

LOADS = {
    "text.layers.0": torch.tensor([6, 2, 0, 0]),
    "text.layers.1": torch.tensor([2, 2, 2, 2]),
    "vision.blocks.1": torch.tensor([3, 1]),
    "vision.merger": torch.tensor([1, 1]),
}
BRANCHES = {
    "text.layers.0": "text",
    "text.layers.1": "text",
    "vision.blocks.1": "vision",
    "vision.merger": "projector",
}
ROUTING = {
    "text.layers.0": {"dead": 2.0, "drop_rate": 0.3, "aux_loss": 2.0, "balance_loss": 0.02},
    "text.layers.1": {"dead": 0.0, "drop_rate": 0.1, "aux_loss": 1.0, "balance_loss": 0.01},
    "vision.blocks.1": {"dead": 0.0},
    "vision.merger": {"dead": 0.0, "balance_loss": 0.5},
}
TIMINGS = {name: {"moe_ms": 20.0, "a2a_ms": 5.0} for name in LOADS} | {"vision.merger": {}}


def moe_lines(directory):
    return [json.loads(line) for line in (directory / "moe.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------- a layer


def test_figures_of_a_router_equal_a_count_token_by_token():
    config = MoEConfig(capacity_factor=0.5, min_capacity=0, aux_loss=0.1)
    layer = MoE(12, 8, 5, 2, config).double()
    init_weights(layer, 0, std=0.5)
    layers = [torch.randn(n, 12, dtype=torch.float64) for n in (17, 9)]
    for x_TD in layers:
        layer(x_TD, tokens_of([len(x_TD)]))
    router = layer.router
    sums = dict(zip(SUMS, router.sums.tolist(), strict=True))
    found = Figures(router.load_E, sums).summary(config, step=0)

    loads, entropy, square, losses, kept = [0] * 5, 0.0, 0.0, [], 0
    for x_TD in layers:
        room, taken, probabilities, own = math.ceil(len(x_TD) * 2 / 5 * 0.5), [0] * 5, [0.0] * 5, []
        for x in x_TD:
            logits = (router.weight @ x).tolist()
            exps = [math.exp(logit) for logit in logits]
            share = [e / sum(exps) for e in exps]
            entropy -= sum(p * math.log(p) for p in share)
            square += sum(logit**2 for logit in logits) / 5
            probabilities = [a + b for a, b in zip(probabilities, share, strict=True)]
            for expert in sorted(range(5), key=lambda e: -logits[e])[:2]:  # noqa: B023
                loads[expert] += 1
                own.append(expert)
                kept += taken[expert] < room
                taken[expert] += 1
        fractions = [own.count(e) / len(own) for e in range(5)]
        means = [p / len(x_TD) for p in probabilities]
        losses.append(5 * sum(f * p for f, p in zip(fractions, means, strict=True)))
    assert router.load_E.tolist() == loads
    assert found["dead"] == loads.count(0)
    assert found["gate_entropy"] == pytest.approx(entropy / 26, rel=1e-12)
    assert found["logit_rms"] == pytest.approx(math.sqrt(square / 26), rel=1e-12)
    assert 0 < kept < 52 and found["drop_rate"] == pytest.approx(1 - kept / 52, rel=1e-12)
    assert found["aux_loss"] == pytest.approx(sum(losses) / 2, rel=1e-12)
    assert found["balance_loss"] == pytest.approx(0.1 * sum(losses) / 2, rel=1e-12)


def test_a_figure_of_a_layer_is_found_under_its_name():
    layers = layer_figures(LOADS, ROUTING, TIMINGS, step_ms=100.0)
    assert list(layers) == list(LOADS)
    first = layers["text.layers.0"]
    assert first["imbalance"] == 3.0 and first["min"] == 0.0  # 6 of 2 on average
    assert first["moe_share"] == 0.2 and first["a2a_share"] == 0.05
    assert ROUTING["text.layers.0"].items() <= first.items()
    assert "a2a_share" not in layers["vision.merger"]


# ---------------------------------------------------------------------------- a branch


@pytest.mark.parametrize("pp_ranks", [1, 2])
def test_a_branch_is_summed_up(pp_ranks):
    branches = branch_figures(layer_figures(LOADS, ROUTING, TIMINGS, 100.0), BRANCHES, pp_ranks)
    assert branches["text"] == {
        "imbalance": 3.0,
        "min": 0.0,
        "drop_rate": pytest.approx(0.2),
        "dead": 2.0,
        "balance_loss": pytest.approx(0.03),
        "moe_share": pytest.approx(0.4 / pp_ranks),
        "a2a_share": pytest.approx(0.1 / pp_ranks),
    }
    assert branches["vision"]["imbalance"] == 1.5 and "drop_rate" not in branches["vision"]
    assert branches["projector"] == {
        "imbalance": 1.0,
        "min": 1.0,
        "dead": 0.0,
        "balance_loss": 0.5,
    }


def test_a_record_has_the_branches_and_moe_jsonl_the_layers(tmp_path):
    metrics = logger(tmp_path, log_every=1)
    metrics.branches = BRANCHES
    record = step(metrics, 1, expert_loads=LOADS, routing=ROUTING, timings=TIMINGS)
    metrics.close()
    assert record["moe/text/drop_rate"] == pytest.approx(0.2)
    assert record["moe/projector/balance_loss"] == 0.5
    assert record["balance_loss"] == pytest.approx(0.53)
    per_layer = {key for key in record if key.startswith("experts/")}
    assert per_layer == {f"experts/{n}/{key}" for n in LOADS for key in ("min", "max", "entropy")}
    (line,) = moe_lines(tmp_path)
    assert line["step"] == 1 and list(line["layers"]) == list(LOADS)
    for name, figures in line["layers"].items():
        assert figures["load"] == LOADS[name].tolist()
        assert ROUTING[name].items() <= figures.items() and TIMINGS[name].items() <= figures.items()
    shown = console_line(record, 100)
    loads = "experts text 0.00-3.00, vision 0.50-1.50, projector 1.00-1.00"
    assert f"{loads} | drops 20.0%" in shown
    assert "drops" not in console_line(record | {"moe/text/drop_rate": 0.0}, 100)


def test_shares_are_of_the_reported_step_alone(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("titan_vlm.training.metrics.time.perf_counter", lambda: clock[0])
    metrics = logger(tmp_path, log_every=2)
    clock[0] += 50
    step(metrics, 1)
    with metrics.pause():
        clock[0] += 1000
    clock[0] += 0.1
    assert step(metrics, 2, expert_loads=LOADS, timings=TIMINGS)["step_ms"] == pytest.approx(100)
    assert moe_lines(tmp_path)[0]["layers"]["text.layers.0"]["moe_share"] == pytest.approx(0.2)


def test_tensorboard_has_every_figure_of_a_layer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = logger(tmp_path, tensorboard=True, log_every=1)
    step(metrics, 1, expert_loads=LOADS, routing=ROUTING, timings=TIMINGS)
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key, value in {"drop_rate": 0.3, "max": 3.0, "a2a_ms": 5.0, "dead": 2.0}.items():
        (scalar,) = events.Scalars(f"experts/text.layers.0/{key}")
        assert (scalar.step, scalar.value) == (1, pytest.approx(value))
    assert "moe/text/imbalance" in events.Tags()["scalars"]


def test_a_resumed_run_continues_moe_jsonl_at_its_step(tmp_path):
    metrics = logger(tmp_path, log_every=1)
    for number in range(1, 5):
        step(metrics, number, expert_loads=LOADS)
    metrics.close()
    with (tmp_path / "moe.jsonl").open("a") as file:
        file.write('{"step": 5, "lay')  # killed while writing
    metrics = logger(tmp_path, start=2, log_every=1)
    assert [line["step"] for line in moe_lines(tmp_path)] == [1, 2]
    step(metrics, 3, expert_loads=LOADS)
    metrics.close()
    assert [line["step"] for line in moe_lines(tmp_path)] == [1, 2, 3]


def test_a_run_without_experts_has_no_moe_jsonl(tmp_path):
    metrics = logger(tmp_path, log_every=1)
    assert not any(key.startswith("moe/") for key in step(metrics, 1))
    metrics.close()
    assert not (tmp_path / "moe.jsonl").exists() and records(tmp_path)


def test_a_run_reports_its_branches_and_times(tmp_path):
    vision = {"experts": "4", "top_k": "1", "expert_width": "16", "layers": "[0]"}
    projector = {"experts": "4", "top_k": "2", "expert_width": "16"}
    changes = {f"moe__vision__{key}": x for key, x in vision.items()}
    changes |= {f"moe__projector__{key}": x for key, x in projector.items()}
    changes |= {"checkpoint__export_hf": "false", "training__steps": "2"}
    changes |= {"training__global_batch_size": "3", "activation_checkpoint__mode": "full"}
    assert run(tmp_path, **changes) == 0
    lines = records(tmp_path)
    for record, line in zip([x for x in lines if "loss" in x], moe_lines(tmp_path), strict=True):
        own = {"vision": ["vision.blocks.0"], "text": [], "projector": []}
        for name in line["layers"]:
            if name != "vision.blocks.0":
                own["projector" if name.startswith("vision.") else "text"].append(name)
        assert len(own["text"]) > 1 and len(own["projector"]) > 1
        for branch, names in own.items():
            figures = [line["layers"][name] for name in names]
            worst = max(max(x["load"]) * len(x["load"]) / sum(x["load"]) for x in figures)
            assert record[f"moe/{branch}/imbalance"] == pytest.approx(worst)
            shares = [x["moe_ms"] / record["step_ms"] for x in figures]
            assert record[f"moe/{branch}/moe_share"] == pytest.approx(sum(shares))
            # A micro-batch has a row, so there are three; recomputation counts none.
            assert all(x["moe_calls"] == 3 and x["moe_ms"] > 0 for x in figures)
            assert all(x["moe_ms_max"] == x["moe_ms"] for x in figures)  # there is one rank
            assert all("a2a_ms" not in x and 0 <= x["padding"] < 1 for x in figures)
        assert 0 < sum(record[f"moe/{branch}/moe_share"] for branch in own) < 1


# ---------------------------------------------------------------------------- warnings


def test_dear_exchanges_are_told_when_they_begin_and_when_they_begin_again(caplog):
    warnings = Warnings()
    for share in (0.1, 0.19, 0.21, 0.15, 0.3):
        warnings.look({}, {"text": {"a2a_share": share}, "vision": {"a2a_share": 0.1}})
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "take 31% of the step, more than 30%" in caplog.messages[0]
    assert "take 40% of the step" in caplog.messages[1]


def test_drops_are_told_of_the_branch_that_has_them(caplog):
    warnings = Warnings()
    for text, vision in ((0.02, 0.03), (0.021, 0.03), (0.5, 0.0), (0.5, 0.04)):
        warnings.look({}, {"text": {"drop_rate": text}, "vision": {"drop_rate": vision}})
    told = [message.split(" of the pairs")[0] for message in caplog.messages]
    assert told == ["vision: 3.0%", "text: 2.1%", "vision: 4.0%"]
    assert "moe.text.capacity_factor" in caplog.messages[1]


def test_a_starved_expert_is_told_by_layer_and_number(caplog):
    warnings = Warnings()

    def look(*loads):
        warnings.look({"text.layers.3": torch.tensor(loads), "idle": torch.zeros(2)}, {})
        return len(caplog.messages)

    told = [look(4, 0, 2) for _ in range(STARVED_REPORTS + 2)]
    assert told == [0] * (STARVED_REPORTS - 1) + [1] * 3
    said = "text.layers.3: no token in 3 reports in a row for expert 1: balance"
    assert caplog.messages[0].startswith(said)
    assert look(4, 1, 2) == 1  # well again
    assert [look(4, 0, 2) for _ in range(STARVED_REPORTS)] == [1] * (STARVED_REPORTS - 1) + [2]


def test_many_starved_experts_are_one_line(caplog):
    warnings = Warnings()
    for _ in range(STARVED_REPORTS):
        warnings.look({"vision.blocks.1": torch.tensor([1] + [0] * 11)}, {})
    (line,) = caplog.messages
    assert "for experts 1, 2, 3, 4, 5, 6, 7, 8 and 3 others" in line
