"""Dropout: attention weights and outputs of MoE layers, drawn alike on every mesh."""

import pytest
import torch

from tests.small_run import small_config
from titan_vlm import distributed
from titan_vlm.errors import ConfigError
from titan_vlm.models.inputs import IGNORE_LABEL, Batch
from titan_vlm.models.layers.attention import Documents, Dropout, attend
from titan_vlm.models.moe import noise
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.tokens import Moment, tokens_of
from titan_vlm.models.qwen3_vl.config import FLAVORS
from titan_vlm.models.qwen3_vl.model import Qwen3VL
from titan_vlm.parallel import support
from titan_vlm.parallel.tensor import sequence_part

HEADS, KV_HEADS, WIDTH = 4, 2, 8
LENS, KEYS = [5, 1, 3, 3, 2], [11, 12, 13, 14, 0]
MOMENT = Moment(seed=3, step=7)


def by_loops(q, k, v, causal, rate, layer):
    """Token by token, head by head."""
    rows, start = [], 0
    for length, key in zip(LENS, KEYS, strict=True):
        alone = tokens_of([length], [key], None, MOMENT)
        numbers = [noise.uniform(alone, layer, f"attention.{h}", length) for h in range(HEADS)]
        for i in range(length):
            heads = []
            for h in range(HEADS):
                group = h // (HEADS // KV_HEADS)
                seen = [j for j in range(length) if j <= i or not causal]
                keys = torch.stack([k[start + j, group] for j in seen])
                weights = (keys @ q[start + i, h] / WIDTH**0.5).softmax(0)
                kept = torch.stack([(numbers[h][i, j] >= rate).double() for j in seen])
                values = torch.stack([v[start + j, group] for j in seen])
                heads.append((weights * kept / (1 - rate)) @ values)
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_dropout_equals_loops(causal):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(sum(LENS), heads, WIDTH, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    dropout = Dropout(0.3, "layer", MOMENT)
    ours = attend(q, k, v, Documents(LENS, KEYS), causal, dropout=dropout)
    wanted = by_loops(q, k, v, causal, 0.3, "layer")
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    given = torch.autograd.grad(ours.sin().sum(), (q, k, v))
    for g, w in zip(given, torch.autograd.grad(wanted.sin().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)
    whole = attend(q, k, v, Documents(LENS, KEYS), causal)
    assert not torch.allclose(ours, whole)
    without = attend(q, k, v, Documents(LENS, KEYS), causal, dropout=Dropout(0.0, "a", MOMENT))
    torch.testing.assert_close(without, whole, rtol=1e-12, atol=1e-12)


def test_a_document_has_its_numbers_wherever_it_lies_and_whoever_has_its_heads():
    torch.manual_seed(0)
    q = torch.randn(8, 4, WIDTH, dtype=torch.float64)
    dropout = Dropout(0.5, "layer", MOMENT)
    joint = attend(q, q, q, Documents([5, 3], [1, 2]), True, dropout=dropout)
    swapped = torch.cat((q[5:], q[:5]))
    other = attend(swapped, swapped, swapped, Documents([3, 5], [2, 1]), True, dropout=dropout)
    torch.testing.assert_close(torch.cat((other[3:], other[:3])), joint)
    half = q[:, 2:]
    late = Dropout(0.5, "layer", MOMENT, first_head=2)
    mine = attend(half, half, half, Documents([5, 3], [1, 2]), True, dropout=late)
    torch.testing.assert_close(mine, joint[:, 2:])


def test_a_share_is_left_out_that_differs_by_head_layer_step_and_document():
    weights = torch.ones(2, 3, 64, 64)

    def kept(layer="a", step=1):
        dropped = Dropout(0.25, layer, Moment(seed=3, step=step))(weights, [1, 2])
        assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        return dropped != 0

    first = kept()
    for masks in (*first.flatten(0, 1), kept("b"), kept(step=2)):
        assert masks.float().mean().item() == pytest.approx(0.75, abs=0.02)
    masks = [*first.flatten(0, 1), kept("b")[0, 0], kept(step=2)[0, 0]]
    for i, one in enumerate(masks):
        for other in masks[:i]:  # independent: both kept in 0.75 x 0.75
            assert (one & other).float().mean().item() == pytest.approx(0.5625, abs=0.03)


def test_the_keys_of_documents_are_those_of_samples_with_or_without_padded_rows():
    tokens = torch.zeros(2, 5, dtype=torch.long)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    batch = Batch(
        tokens,
        torch.full_like(tokens, IGNORE_LABEL),
        torch.zeros(3, 2, 5, dtype=torch.long),
        valid,
        doc_lens=[2, 1, 2, 1, 4],
        pixels_NC=torch.zeros(0, 1),
        grids=[],
        visual_index_M=torch.zeros(0, dtype=torch.long),
        sample_keys=[21, 22, 23, 24],
    )
    assert batch.doc_keys == [21, 22, 0, 23, 24]
    part, _ = sequence_part(batch, 4, 1)  # each row has 8 positions now
    assert part.doc_lens == [2, 1, 2, 3, 1, 4, 3]
    assert part.doc_keys == [21, 22, 0, 0, 23, 24, 0]


@pytest.mark.parametrize("shared", [0, 6])
def test_an_moe_layer_drops_of_its_output_in_training_only(shared):
    torch.manual_seed(0)
    config = MoEConfig(dropout=0.3, shared_width=shared)
    layer = MoE(16, 8, 4, 2, config, name="text.layers.1").double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    valid = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0]).bool()
    tokens = tokens_of([4, 4], [5, 6], valid, MOMENT)
    x = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    whole = layer.eval()(x, tokens)
    numbers = noise.uniform(tokens, "text.layers.1", "dropout", 16, torch.float32)
    factors = torch.ones(8, 16, dtype=torch.float64)
    factors[valid] = (numbers >= 0.3).double() / 0.7
    torch.testing.assert_close(layer.train()(x, tokens), whole * factors)
    assert 0.2 < (factors[valid] == 0).double().mean() < 0.4
    ours = torch.autograd.grad(layer(x, tokens).sum(), x)
    torch.testing.assert_close(
        ours, torch.autograd.grad((layer.eval()(x, tokens) * factors).sum(), x)
    )


def test_the_decoder_drops_in_training_and_its_layers_by_their_own_names(monkeypatch):
    import dataclasses

    seen = []
    monkeypatch.setattr(Dropout, "__call__", lambda self, w, keys: seen.append((self, keys)) or w)
    flavor = FLAVORS["debug_moe"]
    text = dataclasses.replace(flavor.text, attention_dropout=0.2)
    model = Qwen3VL(dataclasses.replace(flavor, text=text))
    tokens = torch.zeros(1, 6, dtype=torch.long)
    batch = Batch(
        tokens,
        tokens,
        torch.zeros(3, 1, 6, dtype=torch.long),
        torch.tensor([[1, 1, 1, 1, 1, 0]]).bool(),
        doc_lens=[3, 2, 1],
        pixels_NC=torch.zeros(0, flavor.vision.patch_dim),
        grids=[],
        visual_index_M=torch.zeros(0, dtype=torch.long),
        sample_keys=[8, 9],
        moment=MOMENT,
    )
    model.eval()(batch)
    assert not seen
    model.train()(batch)
    layers = range(flavor.text.num_layers)
    assert {of.layer for of, _ in seen} == {f"text.layers.{i}" for i in layers}
    assert {(of.rate, of.moment, of.first_head) for of, _ in seen} == {(0.2, MOMENT, 0)}
    assert [key for _, keys in seen for key in keys] == [8, 9, 0] * len(layers)


def test_attention_dropout_is_refused_where_flash_attention_runs(tmp_path, monkeypatch):
    changes = {"training__attention_dropout": "0.1", "training__dtype": "bfloat16"}
    degrees = {"ep": 1, "tp": 1}

    def refused(**more):
        config = small_config(tmp_path, **changes | more)
        support.refuse_combinations(config, degrees, None, FLAVORS["debug_moe"])

    refused()  # a CPU has no such kernel
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="attention_dropout does not go with .* on CUDA"):
        refused()
    refused(training__dtype="float32")
    refused(run__device="cpu")
