"""Recomputation changes what is kept, not what is computed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from titan_vlm.config import ActivationCheckpoint
from titan_vlm.parallel import activation_checkpoint

WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x, lengths, scale=1.0):
        self.calls += 1
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1) * scale
        assert sum(lengths) == x.shape[1]
        return x + self.down(F.dropout(F.gelu(self.up(F.layer_norm(x, (WIDTH,))).sin()), 0.1))


class Model(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.double()

    def blocks(self):
        for i, block in enumerate(self.layers):
            yield f"text.layers.{i}", block

    def forward(self, x):
        for block in self.layers:
            x = block(x, [2, x.shape[1] - 2], scale=0.5)
        return x


def prepared(mode, **settings):
    return activation_checkpoint.apply(Model(), ActivationCheckpoint(mode=mode, **settings))


def step(model):
    """Loss, gradients, and how many numbers the forward pass kept for the backward pass."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, WIDTH, generator=generator, dtype=torch.float64)
    kept = {}
    torch.manual_seed(2)  # dropout is replayed in the recomputation

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("mode", ["none", "full", "selective", "layers"])
def test_loss_and_gradients_are_those_of_the_model_without_it(mode):
    loss, grads, _ = step(prepared(mode))
    want, want_grads, _ = step(Model())
    assert loss == want
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-14, atol=1e-14)


def test_names_do_not_change():
    plain = Model()
    for mode in ("full", "selective", "layers"):
        model = prepared(mode)
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"mode": "none"}, [1, 1, 1, 1]),
        ({"mode": "full"}, [2, 2, 2, 2]),
        ({"mode": "selective"}, [2, 2, 2, 2]),
        ({"mode": "layers", "every": 2}, [2, 1, 2, 1]),
        ({"mode": "layers", "every": 3}, [2, 1, 1, 2]),
    ],
)
def test_the_blocks_that_are_run_again(settings, calls):
    model = prepared(**settings)
    step(model)
    assert [block.calls for block in model.layers] == calls


def test_a_checkpointed_block_keeps_less():
    kept = {mode: step(prepared(mode))[2] for mode in ("none", "full", "layers")}
    assert kept["full"] < kept["layers"] < kept["none"]
    assert kept["full"] < 0.3 * kept["none"]


class CountOperators(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] = self.counts.get(func.name(), 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "again"), [("full", True), ("selective", False)])
def test_selective_runs_no_matrix_product_and_no_attention_twice(mode, again):
    def operators(model):
        with CountOperators() as mode:
            step(model)
        return mode.counts

    once, counts = operators(Model()), operators(prepared(mode))
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert once[attention] == 4 and once["aten::addmm"] == 12
    assert (counts[attention] > once[attention]) == again
    assert (counts["aten::addmm"] > once["aten::addmm"]) == again
    assert counts["aten::sin"] == 2 * once["aten::sin"]


def test_evaluation_runs_the_plain_block():
    model = prepared("selective")
    with torch.no_grad():
        model(torch.zeros(1, 4, WIDTH, dtype=torch.float64))
    assert [block.calls for block in model.layers] == [1, 1, 1, 1]
