"""Steps made to go wrong, and runs by hand that know nothing of guards, to compare with."""

import json
import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.small_run import Silent, small_config
from titan_vlm import distributed, train
from titan_vlm.data.loader import RowLoader
from titan_vlm.data.rows import Row, collate
from titan_vlm.models.moe.layer import moe_layers
from titan_vlm.models.moe.tokens import Moment
from titan_vlm.training.optimizer import clip_grad_norm
from titan_vlm.training.schedule import set_learning_rates

NAN = float("nan")
# Everything that a step may change: weights, moments, biases of routers, counters.
STEERED = {
    "moe__text__score": "sigmoid",
    "moe__text__bias_update": "sign",
    "moe__text__bias_speed": "0.01",
    "checkpoint__export_hf": "false",
    "training__max_norm": "0.1",
}


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spoil_gradient(run_, loss):
    """One number of this rank's gradients."""
    grad = max((p.grad for p in run_.model.parameters() if p.grad is not None), key=_local_size)
    local(grad).view(-1)[0] = NAN
    return loss


def _local_size(grad):
    return local(grad).numel()


def spoil_loss(run_, loss):
    return loss + float("inf")


def spoil_router(run_, loss):
    for layer in moe_layers(run_.model).values():
        layer.router.broken += 1
    return loss


SPOILS = {"gradient": spoil_gradient, "loss": spoil_loss, "router": spoil_router}


def raise_loss(run_, loss):
    """To a spike."""
    return 50 * loss


@contextmanager
def spoiled_steps(kind: str, steps: set[int], rank: int, once: bool = False):
    """The pass of these steps (counted from 1) goes wrong, on this rank alone; `once`: not when the
    step is done again."""
    whole, left = train.forward_backward, set(steps)

    def forward_backward(run_, batches, targets):
        loss = whole(run_, batches, targets)
        if run_.step + 1 in left and dist.get_rank() == rank:
            left.difference_update({run_.step + 1} if once else ())
            loss = (SPOILS | {"spike": raise_loss})[kind](run_, loss)
        return loss

    with patch.object(train, "forward_backward", forward_backward):
        yield


@contextmanager
def rows_changed(change: Callable[[int, Row], Row | None]):
    """Every row goes through `change`, with its number; None leaves it out of the data."""
    whole = RowLoader.__next__

    def changed(loader):
        while True:
            number = loader.rows.consumed + loader.rows.rank
            if (row := change(number, whole(loader))) is not None:
                return row

    with patch.object(RowLoader, "__next__", changed):
        yield


def spoil_pixels(numbers):
    def change(number, row):
        if number in numbers:
            assert len(row.pixels_NC)
            row.pixels_NC[0, 0] = NAN
        return row

    return change


def leave_out(numbers):
    return lambda number, row: None if number in numbers else row


def state_of(run_) -> dict[str, torch.Tensor]:
    """Whole tensors: parameters, buffers and counters, moments."""
    tensors = dict(run_.model.state_dict())
    tensors |= {
        f"{name}.{key}": value
        for name, parameter in run_.model.named_parameters()
        for key, value in run_.optimizer.state.get(parameter, {}).items()
    }
    for name, layer in moe_layers(run_.model).items():
        router = layer.router
        tensors |= {f"{name}.load": router.load_E, f"{name}.placed": router.placed_E}
        tensors |= {f"{name}.sums": router.sums, f"{name}.broken": router.broken}
        if router.steering is not None:
            tensors[f"{name}.pending"] = router.steering.pending
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
        for name, x in tensors.items()
    }


def by_hand(output: Path, changes: dict[str, str], left_out: set[int], steps: int):
    """The steps of a run, written down again, without the updates of some."""
    run_ = train.prepare(small_config(output, **changes))
    config, mesh = run_.config.training, run_.mesh
    mine, micro = config.global_batch_size // mesh.batch.size(), config.micro_batch_size
    for step in range(steps):
        set_learning_rates(run_.optimizer, step, run_.config.schedule, config.steps)
        rows = list(islice(run_.loader, mine))
        moment = Moment(run_.config.run.seed, step, micro_batches=mine // micro, observe=False)
        batches = [
            collate(rows[i * micro : (i + 1) * micro], replace(moment, micro_batch=i))
            for i in range(mine // micro)
        ]
        targets = torch.tensor([sum(float(b.num_targets) for b in batches)], dtype=torch.float64)
        targets = float(distributed.sum_over(mesh.batch, targets))
        layers = moe_layers(run_.model)
        counters = {
            name: [x.clone() for x in (of.router.load_E, of.router.placed_E, of.router.sums)]
            for name, of in layers.items()
        }
        train.forward_backward(run_, batches, targets)
        if step + 1 in left_out:
            for name, of in layers.items():
                router = of.router
                for x, was in zip(
                    (router.load_E, router.placed_E, router.sums), counters[name], strict=True
                ):
                    x.copy_(was)
                if router.steering is not None:
                    router.steering.pending.zero_()
        else:
            for of in layers.values():
                if (steering := of.router.steering) is not None:
                    total = distributed.sum_over(mesh.tokens, steering.pending.clone())
                    steering.update(total)
                    steering.pending.zero_()
            clip_grad_norm(run_.model.parameters(), config.max_norm, mesh.degrees["pp"])
            run_.optimizer.step()
        run_.optimizer.zero_grad()
    return run_


def guarded(output: Path, changes: dict[str, str], steps: int, tell=None):
    """The trainer's own steps, not reported."""
    run_ = train.prepare(small_config(output, **changes))
    if tell:
        run_.guard.tell = tell
    for _ in range(steps):
        train.train_step(run_, Silent())
    return run_


def records(output: Path) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "loss" in r]


def final_state(output: Path, **changes: str) -> dict[str, torch.Tensor]:
    """Of a run that has ended, from its last checkpoint."""
    run_ = train.prepare(small_config(output, **changes))
    try:
        return state_of(run_)
    finally:
        run_.loader.close()
        dist.destroy_process_group()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    differing = [
        name
        for name, x in theirs.items()
        if not (torch.equal(ours[name], x) and ours[name].isfinite().all())
    ]
    assert not differing, differing


class Listener(logging.Handler):
    """Warnings of a rank."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record):
        self.said.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("titan_vlm").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("titan_vlm").removeHandler(self)
