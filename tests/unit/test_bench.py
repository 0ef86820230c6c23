"""The benchmark's bookkeeping: what is timed, what is left out, and what the batch holds."""

import json
from dataclasses import replace

import pytest
import torch

from scripts import bench_moe, bench_train
from titan_vlm.models.inputs import IGNORE_LABEL

CPU = torch.device("cpu")


def test_sides_take_turns_and_warm_up_steps_do_not_count(monkeypatch):
    order, clock = [], [0.0]

    def side(name: str, seconds: float, first: float):
        def run() -> None:
            clock[0] += first if order.count(name) < 3 else seconds
            order.append(name)

        return run

    monkeypatch.setattr(bench_train.time, "perf_counter", lambda: clock[0])
    sides = {"a": side("a", 1.0, first=50.0), "b": side("b", 2.0, first=70.0)}
    assert bench_train.interleaved(sides, 1, CPU) == {"a": 1.0, "b": 2.0}
    assert order == ["a", "b"] * 4


def test_batch_holds_every_visual_token_and_labels_are_the_next_tokens():
    config = bench_train.model_config(CPU)
    batch = bench_train.make_batch(config)
    patches = sum(t * h * w for t, h, w in batch.grids)
    assert len(batch.pixels_NC) == patches
    assert len(batch.visual_index_M) == patches // config.vision.merge_size**2
    assert bool((batch.tokens_BS.flatten()[batch.visual_index_M] == config.image_token_id).all())
    assert sum(batch.doc_lens) == batch.tokens_BS.numel()
    assert torch.equal(batch.labels_BS[:, :-1], batch.tokens_BS[:, 1:])
    assert bool((batch.labels_BS[:, -1] == IGNORE_LABEL).all())


def test_cuda_measures_the_layer_of_30b_a3b():
    text = bench_train.model_config(torch.device("cuda")).text
    assert (text.hidden_size, text.moe_intermediate_size) == (2048, 768)
    assert (text.num_experts, text.num_experts_per_tok) == (128, 8)


def test_moe_table_has_every_side_that_is_there(capsys):
    bench_moe.main(["--quick", "--peer-python", "/no/such/python"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert any("torchtitan is left out: " in line for line in lines)
    heading = next(line for line in lines if line.startswith("| T"))
    for side in bench_moe.SIDES:
        assert f"| {side} " in heading
    rows = json.loads(last)["rows"]
    assert [row["skewed"] for row in rows] == [False, True]
    assert rows[1]["busiest_over_mean"] > 2 > rows[0]["busiest_over_mean"]
    for row, line in zip(rows, lines[-len(rows) :], strict=True):
        assert list(row["ms"]) == ["ours", "eager", "grouped_mm", "dense"]
        assert all(ms > 0 for ms in row["ms"].values())
        assert line.count("|") == heading.count("|")


SHAPE = bench_moe.Shape(tokens=40, width=32, hidden=16, experts=8, top_k=2)


@pytest.mark.parametrize("matrix", ["router_ED", "gate_EFD", "up_EFD", "down_EDF"])
def test_moe_sides_that_do_other_work_are_never_timed(matrix, monkeypatch):
    def other_side(shape, weights, dtype, device):
        values = getattr(weights, matrix).clone()
        values[0] *= 1.01
        return our_side(shape, replace(weights, **{matrix: values}), dtype, device)

    our_side = bench_moe.our_side
    bench_moe.check_equal(SHAPE, "cpu", None)
    monkeypatch.setattr(bench_moe, "our_side", other_side)
    monkeypatch.setattr(bench_moe, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="is off ours by"):
        bench_moe.main(["--quick"])


def test_moe_sides_take_turns_and_the_median_step_counts():
    order = []

    def side(name: str, seconds: list[float]):
        def step(i: int) -> bench_moe.Seconds:
            order.append((name, i))
            return bench_moe.Seconds(seconds[i], seconds[i] / 2)

        return step

    first = [9.0] * bench_moe.WARM_UP
    steppers = {"a": side("a", [*first, 3.0, 1.0, 2.0]), "b": side("b", [*first, 5.0, 5.0, 4.0])}
    taken = bench_moe.interleaved(steppers, bench_moe.WARM_UP + 3)
    assert (taken["a"].both, taken["b"].both) == (3.0, 7.5)
    assert order == [(name, i) for i in range(bench_moe.WARM_UP + 3) for name in "ab"]
    forward, backward = bench_moe.rates(SHAPE, bench_moe.Seconds(1e-12, 1e-12))
    assert (forward, backward) == (6 * 80 * 32 * 16, 12 * 80 * 32 * 16)
