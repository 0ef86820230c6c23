"""Which layout is chosen on a CPU: as much work as necessary, in as few calls as that allows."""

import pytest
import torch

from titan_vlm.models.moe.experts import grouped_matmul
from titan_vlm.models.moe.layout import ALIGN, ALIGN_WIDE, make_layout, spare_rows
from titan_vlm.models.moe.routing import Routing


def layout_of(counts: list[int], dtype: torch.dtype):
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    pairs = torch.arange(len(experts))
    return make_layout(Routing(pairs, experts, torch.ones(len(pairs)), len(counts)), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_groups_are_one_batched_matmul(dtype):
    assert layout_of([ALIGN * 5 - 1, ALIGN * 5, ALIGN * 5 - 7], dtype).group == ALIGN * 5


@pytest.mark.parametrize("amx", [True, False])
def test_bfloat16_on_amx_takes_some_fillers_for_one_call_and_nothing_else_does(amx, monkeypatch):
    monkeypatch.setattr("titan_vlm.models.moe.layout.AMX", amx)
    counts = [ALIGN * 4, ALIGN * 5, ALIGN * 6]
    assert layout_of(counts, torch.bfloat16).group == (ALIGN * 6 if amx else None)
    assert layout_of(counts, torch.float32).group is None


def test_fillers_count_in_rows_however_large_the_groups_are(monkeypatch):
    """A factor would allow large groups any number of fillers."""
    monkeypatch.setattr("titan_vlm.models.moe.layout.AMX", True)
    waste = spare_rows(torch.bfloat16)
    few, many = waste - ALIGN, waste + ALIGN
    for size in (ALIGN * 4, ALIGN * 64):
        assert layout_of([size, size + 2 * few], torch.bfloat16).group == size + 2 * few
        assert layout_of([size, size + 2 * many], torch.bfloat16).group is None


def test_few_tokens_compute_the_experts_in_use_alone():
    layout = layout_of([0] * 100 + [1, 1, 1, 1], torch.bfloat16)
    assert layout.group is None
    assert len(layout.source_R) == 4 * ALIGN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ragged_groups_of_any_width(dtype):
    """The grouped kernel wants rows of whole 16 bytes; other widths must do without it."""
    layout = layout_of([ALIGN * 20, 3], dtype)
    assert layout.group is None
    x_RK = torch.randn(len(layout.source_R), 10).to(dtype).requires_grad_()
    weight_EKN = torch.randn(2, 10, 7).to(dtype).requires_grad_()
    out_RN = grouped_matmul(x_RK, weight_EKN, layout)
    out_RN.sum().backward()
    parts = zip(
        x_RK.split([ALIGN * 20, ALIGN if dtype == torch.bfloat16 else ALIGN_WIDE]),
        weight_EKN,
        strict=True,
    )
    expected_RN = torch.cat([x.double() @ w.double() for x, w in parts])
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 5e-2}
    )
    torch.testing.assert_close(out_RN.double(), expected_RN, **tolerance)
    assert x_RK.grad.shape == (len(layout.source_R), 10) and x_RK.grad.isfinite().all()
