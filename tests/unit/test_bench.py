"""The benchmark's bookkeeping: what is timed, what is left out, and what the batch holds."""

import torch

from scripts import bench_train
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
