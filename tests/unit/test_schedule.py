"""The learning-rate schedules at their corners."""

import pytest
import torch

from titan_vlm.config import Schedule
from titan_vlm.training.schedule import lr_factor, set_learning_rates


def schedule(kind, warmup=10, decay=20, ratio=0.1):
    return Schedule(kind=kind, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=ratio)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_is_linear_and_its_first_step_learns(kind):
    factors = [lr_factor(step, schedule(kind), 100) for step in range(10)]
    assert factors == [(step + 1) / 10 for step in range(10)]


@pytest.mark.parametrize(
    ("kind", "middle", "last"),
    [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("wsd", 1.0, 0.1)],
)
def test_middle_and_last_step(kind, middle, last):
    assert lr_factor(54, schedule(kind), 100) == pytest.approx(middle)
    assert lr_factor(99, schedule(kind), 100) == pytest.approx(last)


def test_cosine_is_a_cosine_and_not_a_line():
    quarter = 10 + 90 // 4 - 1
    done = (quarter + 1 - 10) / 90
    assert lr_factor(quarter, schedule("cosine", ratio=0.0), 100) == pytest.approx(
        0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * done)).item()
    )


def test_wsd_is_stable_until_its_decay_begins():
    config = schedule("wsd", ratio=0.0)
    assert [lr_factor(step, config, 100) for step in (10, 50, 79)] == [1.0, 1.0, 1.0]
    assert lr_factor(89, config, 100) == pytest.approx(0.5)
    assert lr_factor(99, config, 100) == 0.0


def test_never_leaves_its_range_even_past_the_end_or_with_a_warm_up_as_long_as_the_run():
    for kind in ("constant", "linear", "cosine", "wsd"):
        for warmup in (0, 1, 100):
            for decay in (0, 1, 100, 300):
                config = schedule(kind, warmup, decay)
                factors = [lr_factor(step, config, 100) for step in range(120)]
                assert all(0.0 < factor <= 1.0 for factor in factors)


def test_each_group_scales_its_own_rate():
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [
        {"params": [a], "lr": 1.0, "initial_lr": 1.0, "name": "base"},
        {"params": [b], "lr": 0.2, "initial_lr": 0.2, "name": "vision"},
        {"params": [c], "lr": 0.2, "initial_lr": 0.2, "name": "vision/no_decay"},
    ]
    optimizer = torch.optim.SGD(groups)
    for step in (7, 4, 4):  # any order: the factor is not accumulated
        rates = set_learning_rates(optimizer, step, schedule("linear"), 100)
    assert rates == {"base": 0.5, "vision": 0.1}
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1, 0.1]
