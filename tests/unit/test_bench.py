"""The benchmark's bookkeeping: what is timed, what is left out, and what the batch holds."""

import json

import pytest
import torch

from scripts import bench_moe, bench_moe_parts, bench_train, moe_sides
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


@pytest.mark.slow
def test_moe_table_has_every_side_that_is_there(capsys):
    bench_moe.main(["--quick", "--peer-python", "/no/such/python"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert any("torchtitan is left out: " in line for line in lines)
    heading = next(line for line in lines if line.startswith("| T"))
    for side in moe_sides.SIDES:
        assert f"| {side} " in heading
    rows = json.loads(last)["rows"]
    assert [row["skewed"] for row in rows] == [False, True]
    assert rows[1]["busiest_over_mean"] > 2 > rows[0]["busiest_over_mean"]
    for row, line in zip(rows, lines[-len(rows) :], strict=True):
        assert list(row["ms"]) == ["ours", "eager", "grouped_mm", "dense"]
        assert all(ms > 0 for ms in row["ms"].values())
        assert line.count("|") == heading.count("|")


SHAPE = bench_moe.Shape(tokens=40, width=32, hidden=16, experts=8, top_k=2)


def output_and_gradient(name: str, weights: moe_sides.Weights) -> torch.Tensor:
    side = moe_sides.SIDES[name](SHAPE, weights, torch.float32, torch.float32, "cpu")
    return moe_sides.output_and_gradient(
        side, moe_sides.make_tokens(SHAPE, 0, torch.float32, "cpu")
    )


@pytest.mark.parametrize("matrix", ["router_ED", "gate_EFD", "up_EFD", "down_EDF"])
@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_moe_sides_are_equal_and_a_hundredth_off_in_one_expert_is_found(name, matrix):
    weights = moe_sides.make_weights(SHAPE, "cpu")
    ours = output_and_gradient("ours", weights)
    bench_moe.compare(name, output_and_gradient(name, weights), ours, bench_moe.EXACT)
    getattr(weights, matrix)[3] *= 1.01
    with pytest.raises(RuntimeError, match=f"{name} is off ours by"):
        bench_moe.compare(name, output_and_gradient(name, weights), ours, bench_moe.EXACT)


def test_moe_sides_are_compared_before_any_is_timed(monkeypatch):
    class Side:
        def __init__(self, value: float):
            self.value = value

        def build(self, *_) -> None:
            pass

        def output_and_gradient(self) -> torch.Tensor:
            return torch.full((2, 1, 1), self.value)

        def close(self) -> None:
            pass

    monkeypatch.setattr(bench_moe, "start", lambda _: {"ours": Side(1.0), "eager": Side(1.001)})
    monkeypatch.setattr(bench_moe, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="the output of eager is off ours by 1.0e-03"):
        bench_moe.main(["--quick"])


def test_moe_sides_take_turns_and_the_median_step_counts():
    order = []

    class Side:
        def __init__(self, name: str, seconds: list[float]):
            self.name, self.seconds = name, seconds

        def ask(self, step: int) -> dict[str, float]:
            order.append((self.name, step))
            return {"forward": self.seconds[step], "backward": self.seconds[step] / 2}

    sides = {"a": Side("a", [4.0, 1.0, 2.0]), "b": Side("b", [5.0, 5.0, 4.0])}
    taken = bench_moe.interleaved(sides, 3)
    assert (taken["a"].both, taken["b"].both) == (3.0, 7.5)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    rates = bench_moe.rates(SHAPE, bench_moe.Seconds(1e-12, 1e-12))
    assert rates == (6 * 80 * 32 * 16, 12 * 80 * 32 * 16)


@pytest.mark.parametrize("part", bench_moe_parts.PLAIN)
def test_a_part_written_plainly_computes_the_same(part):
    shape = moe_sides.Shape(tokens=40, width=16, hidden=16, experts=4, top_k=2)
    side = moe_sides.our_side(
        shape, moe_sides.make_weights(shape, "cpu"), torch.float32, torch.float32, "cpu"
    )
    x_TD = moe_sides.make_tokens(shape, 0, torch.float32, "cpu")
    expected = moe_sides.output_and_gradient(side, x_TD)
    with bench_moe_parts.PLAIN[part]():
        plain = moe_sides.output_and_gradient(side, x_TD)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-6)
