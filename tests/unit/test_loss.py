"""The chunked loss against F.cross_entropy, and what it costs in memory."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from titan_vlm.training.loss import Tally, chunked_cross_entropy

ROWS, SEQUENCE, WIDTH, VOCAB = 2, 13, 8, 37


def inputs(dtype=torch.float64, masked=0.4):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, SEQUENCE, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (ROWS, SEQUENCE), generator=generator)
    labels[torch.rand(ROWS, SEQUENCE, generator=generator) < masked] = -100
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def naive(hidden, weight, labels):
    logits = F.linear(hidden, weight).flatten(0, 1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 16, 1000])
def test_loss_and_gradients_equal_cross_entropy_for_every_chunk_size(chunk_tokens):
    hidden, weight, labels = inputs()
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens)
    grads = torch.autograd.grad(loss / 7, (hidden, weight))
    expected = naive(hidden, weight, labels)
    expected_grads = torch.autograd.grad(expected / 7, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    for grad, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-13)


def test_a_tally_has_the_loss_and_the_targets_of_every_group():
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 7, 8).double(), torch.randn(11, 8).double()
    labels = torch.randint(0, 11, (3, 7)).where(torch.rand(3, 7) < 0.7, -100)
    group = torch.randint(0, 3, (3, 7))  # of 4, one of which has no token
    sums = torch.zeros(2, 4, dtype=torch.float64)
    whole = chunked_cross_entropy(hidden, weight, labels, 4, Tally(group, sums))
    for g in range(4):
        mine = labels.where(group == g, -100)
        logits = hidden.flatten(0, 1) @ weight.T
        expected = F.cross_entropy(logits, mine.flatten(), ignore_index=-100, reduction="sum")
        torch.testing.assert_close(sums[0, g], expected, rtol=1e-12, atol=1e-12)
        assert sums[1, g] == (mine != -100).sum()
    assert sums[1, 3] == 0
    torch.testing.assert_close(sums[0].sum(), whole)
    chunked_cross_entropy(hidden, weight, labels, 4, Tally(group, sums))
    torch.testing.assert_close(sums[0].sum(), 2 * whole)  # of all micro-batches


def test_large_logits_do_not_overflow():
    hidden, weight, labels = inputs(torch.float32)
    loss = chunked_cross_entropy(hidden * 1e3, weight, labels, 4)
    torch.testing.assert_close(loss, naive(hidden * 1e3, weight, labels))


def test_without_valid_target_the_loss_is_zero_and_still_in_the_graph():
    hidden, weight, labels = inputs()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100), 4)
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_the_gradients_asked_for_are_computed(trained):
    hidden, weight, labels = inputs()
    frozen = weight if trained == "hidden" else hidden
    frozen.requires_grad_(False)
    chunked_cross_entropy(hidden, weight, labels, 4).backward()
    kept = hidden if trained == "hidden" else weight
    got, frozen_grad = kept.grad.clone(), frozen.grad
    kept.grad = None
    naive(hidden, weight, labels).backward()
    torch.testing.assert_close(got, kept.grad)
    assert frozen_grad is None


def test_under_no_grad_only_the_loss_is_computed(monkeypatch):
    hidden, weight, labels = inputs()
    monkeypatch.setattr("titan_vlm.training.loss._add_product", None)  # calling it would raise
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, naive(hidden, weight, labels))


def test_bfloat16_inputs_give_a_float32_loss_and_keep_the_weight_gradient_float32_inside():
    hidden, weight, labels = inputs(torch.bfloat16)
    loss = chunked_cross_entropy(hidden, weight, labels, 2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = naive(*exact, labels)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    for grad, want in zip((hidden.grad, weight.grad), exact, strict=True):
        error = (grad.double() - want.grad).abs().max() / want.grad.abs().max()
        assert error < 1e-2


def test_a_confident_prediction_keeps_its_gradient_in_bfloat16():
    # softmax(target) = 0.99995, which bfloat16 rounds to 1; the gradient must not vanish with it.
    hidden = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[10.0], [0.0]], dtype=torch.bfloat16)
    chunked_cross_entropy(hidden, weight, torch.zeros(1, 1, dtype=torch.long), 1).backward()
    assert hidden.grad.item() == pytest.approx(-10 * 4.54e-5, rel=0.02)


def test_under_autocast_float32_masters_get_float32_gradients():
    hidden, weight, labels = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, labels, 4)
        logits = F.linear(hidden, weight)
    loss.backward()
    assert weight.grad.dtype == torch.float32
    expected = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_a_second_backward_is_refused_instead_of_scaled_twice():
    hidden, weight, labels = inputs()
    loss = chunked_cross_entropy(hidden, weight, labels, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


def test_a_tied_weight_collects_both_gradients():
    embed = nn.Embedding(VOCAB, WIDTH, dtype=torch.float64)
    tokens = torch.arange(5).unsqueeze(0)
    chunked_cross_entropy(embed(tokens), embed.weight, tokens, 2).backward()
    got, embed.weight.grad = embed.weight.grad, None
    naive(embed(tokens), embed.weight, tokens).backward()
    torch.testing.assert_close(got, embed.weight.grad)


# Run in a process of its own, whose peak is nobody else's.
MEASURE = """
import json, re, sys
import torch
import torch.nn.functional as F
from titan_vlm.training.loss import chunked_cross_entropy

def peak():
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

kind, tokens = sys.argv[1], int(sys.argv[2])
hidden = torch.randn(1, tokens, 16, requires_grad=True)
weight = torch.randn(151_936, 16, requires_grad=True)
labels = torch.randint(151_936, (1, tokens))
small = torch.randn(1, 2, 16, requires_grad=True)
F.cross_entropy(F.linear(small, weight)[0], labels[0, :2]).backward()  # threads, kernels
before = peak()
if kind == "chunked":
    loss = chunked_cross_entropy(hidden, weight, labels, 1024)
else:
    loss = F.cross_entropy(F.linear(hidden, weight)[0], labels[0], reduction="sum")
loss.backward()
print(json.dumps(peak() - before))
"""


def measure_peak(kind, tokens):
    command = [sys.executable, "-c", MEASURE, kind, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_at_the_real_vocabulary_is_below_a_tenth_of_the_naive_loss():
    # The naive loss needs more than 10 GB at 8,192 tokens and grows linearly with them, so it is
    # measured at 512 and 1,024 tokens and continued along that line.
    half, full = measure_peak("naive", 512), measure_peak("naive", 1024)
    naive_peak = full + (8192 - 1024) * (full - half) / 512
    assert measure_peak("chunked", 8192) < 0.1 * naive_peak


def test_hidden_states_that_are_not_contiguous_get_their_gradient():
    hidden = torch.randn(5, 3, 4, dtype=torch.float64).transpose(0, 1).requires_grad_()
    weight = torch.randn(7, 4, dtype=torch.float64)
    labels = torch.randint(0, 7, (3, 5))
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    (given,) = torch.autograd.grad(loss, hidden)
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    (wanted,) = torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
