"""Attention over packed documents and rotary tables, against their plain definitions."""

import pytest
import torch

from titan_vlm.models.layers.attention import Documents, attend
from titan_vlm.models.layers.rope import interleaved_axes, rotate, text_tables


def dense_reference(q, k, v, doc_lens, causal):
    """Softmax over a full T x T mask."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(doc_lens)), torch.tensor(doc_lens))
    allowed = document[:, None] == document[None, :]
    if causal:
        allowed &= torch.ones_like(allowed).tril()
    scores = torch.einsum("ahc,bhc->hab", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("hab,bhc->ahc", scores.softmax(-1), v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("doc_lens", [[9], [3, 3, 3], [1, 5, 5, 2, 1, 1], [4, 0, 2]])
def test_packed_attention_equals_a_dense_mask(doc_lens, causal):
    torch.manual_seed(0)
    total = sum(doc_lens)
    q = torch.randn(total, 4, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(total, 2, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(total, 2, 8, dtype=torch.float64, requires_grad=True)
    out = attend(q, k, v, Documents(doc_lens), causal)
    expected = dense_reference(q, k, v, doc_lens, causal)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.sin().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.sin().sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs)


def test_attention_memory_is_that_of_the_documents_not_of_the_row():
    """64 documents of 128 tokens in one row: an 8192 x 8192 mask alone would be 64 MiB."""
    from torch.profiler import ProfilerActivity, profile

    q = torch.randn(8192, 1, 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        attend(q, q, q, Documents([128] * 64), causal=True)
    largest = max(event.cpu_memory_usage for event in recorded.events())
    assert largest < 8 * 2**20


def test_interleaved_axes_follow_the_sections():
    axes = interleaved_axes((24, 20, 20))
    assert axes[:6] == (0, 1, 2, 0, 1, 2)
    assert [axes.count(axis) for axis in range(3)] == [24, 20, 20]
    assert set(axes[60:]) == {0}


def test_rotation_makes_scores_depend_on_relative_position_only():
    positions = torch.tensor([[3, 10, 103, 110]]).expand(3, 4)
    cos, sin = text_tables(positions, 32, 1e4, (6, 5, 5), torch.float64)
    q, k = torch.randn(2, 1, 1, 32, dtype=torch.float64)
    q, k = (rotate(x.expand(4, 1, 32), cos, sin).squeeze(1) for x in (q, k))
    torch.testing.assert_close(q[0] @ k[1], q[2] @ k[3])
