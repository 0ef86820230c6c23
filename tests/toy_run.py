"""A training run of milliseconds, for tests of checkpoints."""

import random

import numpy as np
import torch
from torch import nn

from titan_vlm.config import Checkpoint
from titan_vlm.training.checkpoint import Checkpointer


class Model(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.a = nn.Linear(4, width)
        self.b = nn.Linear(width, 3)
        self.unused = nn.Linear(2, 2)  # as a vision tower in a run without images: never a gradient
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += 1
        return self.b(nn.functional.dropout(self.a(x).tanh(), 0.3))


class Run:
    """A training run whose noise comes from every generator that a checkpoint restores."""

    def __init__(self, directory, seed=0, max_failed_saves=1, **settings):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        self.events: list[tuple[str, dict]] = []
        self.checkpointer = Checkpointer(
            directory,
            Checkpoint(**settings),
            max_failed_saves,
            tell=lambda kind, **facts: self.events.append((kind, facts)),
        )

    def train(self, steps):
        for _ in range(steps):
            x = torch.randn(5, 4) * random.random() + np.random.rand()
            self.model(x).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, step, train=None):
        self.checkpointer.save(step, self.model, self.optimizer, train or {})

    def resume(self):
        """What the trainer does; returns the step."""
        step = self.checkpointer.history.find()
        if step is not None:
            self.load(step)
        self.checkpointer.history.go_back()
        return step

    def load(self, step):
        return self.checkpointer.load(step, self.model, self.optimizer)

    def everything(self):
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return {**self.model.state_dict(), **moments}


def assert_same_bits(run, other):
    got, want = run.everything(), other.everything()
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
