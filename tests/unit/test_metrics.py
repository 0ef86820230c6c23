"""What a run reports, and that it does not wait for the device to do so."""

import json
import math
import subprocess
import sys
import time

import pytest
import torch

from titan_vlm.config import Metrics
from titan_vlm.training import metrics as module
from titan_vlm.training.heatmap import heat_map
from titan_vlm.training.metrics import MetricsLogger, console_line
from titan_vlm.training.moe_log import load_summary

CPU = torch.device("cpu")


def logger(directory, total=100, start=0, **settings):
    config = Metrics(**({"tensorboard": False, "log_every": 5} | settings))
    return MetricsLogger(directory, config, total, CPU, start)


def step(metrics, number, **more):
    metrics.count(tokens=60, positions=80, samples=3, images=2, flops=4e9)
    return metrics.end_step(
        number,
        loss=torch.tensor(2.0 + number),
        grad_norm=torch.tensor(0.5),
        learning_rates={"base": 1e-3, "vision": 1e-4},
        **more,
    )


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_reports_every_nth_and_the_last_step_with_the_loss_of_that_very_step(tmp_path, capsys):
    metrics = logger(tmp_path, total=12)
    reported = [number for number in range(1, 13) if step(metrics, number)]
    metrics.close()
    assert reported == [5, 10, 12]
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(5, 7.0), (10, 12.0), (12, 14.0)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines] == ["step  5/12", "step 10/12", "step 12/12"]
    assert len({line.index("tok/s") for line in lines}) == 1  # aligned


def test_rates_are_counts_over_wall_time_without_pauses(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    metrics = logger(tmp_path, log_every=2, peak_tflops=0.008)
    step(metrics, 1)
    with metrics.waiting_for_data():
        clock[0] += 1
    with metrics.pause():
        clock[0] += 1000
    clock[0] += 3
    record = step(metrics, 2)
    assert record["tokens_per_s"] == 30 and record["samples_per_s"] == 1.5
    assert record["images_per_s"] == 1 and record["padding"] == 0.25
    assert record["tflops"] == pytest.approx(0.002) and record["mfu"] == pytest.approx(0.25)
    assert record["data_wait"] == 0.25 and record["memory_gib"] > 0
    assert record["lr/base"] == 1e-3 and record["lr/vision"] == 1e-4
    step(metrics, 3)
    clock[0] += 1
    assert step(metrics, 4)["tokens_per_s"] == 120  # counts begin anew


def test_an_unknown_device_has_no_mfu_and_a_known_one_its_peak(tmp_path, monkeypatch):
    record = step(logger(tmp_path, log_every=1), 1)
    assert "mfu" not in record and "MFU" not in console_line(record, 10)
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H200": 989.4,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA B200": 2250.0,
        "Something else": 0.0,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert module.known_peak(torch.device("cuda")) == peak


class Untouchable:
    def __float__(self):
        raise AssertionError("read between two reports")


def test_values_are_not_read_between_two_reports(tmp_path):
    metrics = logger(tmp_path)
    never = {"layer": Untouchable()}
    for number in range(1, 5):
        metrics.end_step(
            number, loss=Untouchable(), grad_norm=Untouchable(), learning_rates={},
            expert_loads=never,
        )  # fmt: skip
    with pytest.raises(AssertionError, match="read between"):
        metrics.end_step(5, loss=Untouchable(), grad_norm=Untouchable(), learning_rates={})


def test_expert_load_is_given_in_even_shares():
    assert load_summary(torch.tensor([5, 5, 5, 5])) == {
        "min": 1.0, "max": 1.0, "entropy": pytest.approx(1.0),
    }  # fmt: skip
    assert load_summary(torch.tensor([8, 0, 0, 0])) == {"min": 0.0, "max": 4.0, "entropy": 0.0}
    assert load_summary(torch.tensor([0, 0])) == {"min": 0.0, "max": 0.0, "entropy": 0.0}
    half = load_summary(torch.tensor([4, 4, 0, 0]))["entropy"]
    assert half == pytest.approx(math.log(2) / math.log(4))


def test_expert_loads_and_skipped_samples_are_reported(tmp_path):
    loads = {"text.layers.0": torch.tensor([3, 1]), "text.layers.1": torch.tensor([2, 2])}
    metrics = logger(tmp_path, log_every=1)
    record = step(metrics, 1, expert_loads=loads, skipped={"broken image": 2, "too long": 1})
    assert record["experts/text.layers.0/max"] == 1.5 and record["experts/text.layers.0/min"] == 0.5
    assert record["experts/text.layers.1/entropy"] == pytest.approx(1.0)
    assert record["skipped/broken image"] == 2
    line = console_line(record, 100)
    assert line.endswith("experts 0.50-1.50 | skipped 3")  # of the text branch alone: no label
    metrics.branches = dict.fromkeys(loads, "vision")
    line = console_line(step(metrics, 2, expert_loads=loads), 100)
    assert line.endswith("experts vision 0.50-1.50")


def test_heat_map_has_a_cell_for_each_expert_of_each_layer():
    picture = heat_map(torch.tensor([[0.0, 1.0, 2.0], [99.0, 1.0, 0.0]]))
    assert picture.shape == (3, 16, 24) and picture.dtype == torch.uint8
    cells = picture[:, ::8, ::8].permute(1, 2, 0).tolist()
    low, even, high = [68, 1, 84], [33, 145, 140], [253, 231, 37]
    assert cells == [[low, even, high], [high, even, low]]
    assert (picture[:, :8, :8] == torch.tensor(low).view(3, 1, 1)).all()


def test_tensorboard_holds_the_scalars_and_the_heat_map(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = logger(tmp_path, tensorboard=True, log_every=1)
    step(metrics, 1, expert_loads={"a": torch.tensor([3, 1]), "b": torch.ones(5)})
    metrics.report(1, {"accuracy": 0.5})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Tags()["scalars"]
    assert {"loss", "lr/vision", "experts/a/entropy", "eval/accuracy"} <= set(scalars)
    assert events.Scalars("loss")[0].value == 3.0
    pictures = [events.Images(f"experts/load of {size}")[0] for size in (2, 5)]
    assert [(picture.width, picture.height) for picture in pictures] == [(16, 8), (40, 8)]


def test_tensorboard_is_not_even_imported_when_it_is_off(tmp_path):
    code = (
        "import sys, torch; from titan_vlm.config import Metrics;"
        "from titan_vlm.training.metrics import MetricsLogger;"
        f"MetricsLogger({str(tmp_path)!r}, Metrics(tensorboard=False), 1, torch.device('cpu'));"
        "assert 'tensorboard' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_resumed_run_continues_the_file_at_its_step(tmp_path):
    metrics = logger(tmp_path, log_every=1)
    for number in range(1, 5):
        step(metrics, number)
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    metrics = logger(tmp_path, start=2, log_every=1)
    step(metrics, 3)
    metrics.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


def test_on_a_terminal_a_bar_and_the_lines_coexist(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    metrics = logger(tmp_path, total=10)
    for number in range(1, 11):
        step(metrics, number)
        time.sleep(0.02)
    metrics.close()
    captured = capsys.readouterr()
    assert [line[:10] for line in captured.out.splitlines() if line] == ["step  5/10", "step 10/10"]
    assert "10/10" in captured.err and "step/s" in captured.err
