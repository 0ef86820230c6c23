"""Compiled blocks compute what plain blocks compute, under the same names."""

import pytest
import torch
from torch import nn

from titan_vlm.config import ActivationCheckpoint, Compile
from titan_vlm.models.init import init_weights
from titan_vlm.models.inputs import Batch
from titan_vlm.models.qwen3_vl.config import FLAVORS
from titan_vlm.models.qwen3_vl.model import Qwen3VL
from titan_vlm.parallel import activation_checkpoint
from titan_vlm.parallel import compile as compile_blocks


class Block(nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.breaks = breaks
        self.register_buffer("load", torch.zeros(1), persistent=False)

    def forward(self, x, lengths):
        hidden = self.up(x).tanh()
        if self.breaks:
            hidden = self.experts(hidden)
        return x + self.down(hidden) * len(lengths)

    @torch.compiler.disable  # as the MoE layer does, whose sizes depend on the data
    def experts(self, hidden):
        if torch._C._current_graph_task_id() == -1:
            self.load += 1
        return hidden * hidden.nonzero().shape[0]


class Model(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(breaks) for _ in range(3))
        self.double()

    def blocks(self):
        for i, block in enumerate(self.layers):
            yield f"layers.{i}", block

    def forward(self, x):
        for block in self.layers:
            x = block(x, [1, 2])
        return x


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, rows=5):
    x = torch.linspace(-1, 1, rows * 6, dtype=torch.float64).view(rows, 6)
    loss = model(x).square().sum()
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_equals_the_plain_model_with_and_without_recomputation(backend, breaks, mode):
    model, plain = Model(breaks), Model(breaks)
    compile_blocks.apply(model, Compile(enable=True, backend=backend))
    activation_checkpoint.apply(model, ActivationCheckpoint(mode=mode))
    assert list(model.state_dict()) == list(plain.state_dict())
    got, want = gradients(model), gradients(plain)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)
    assert [block.load.item() for block in model.layers] == [breaks] * 3


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize(("breaks", "graphs_of_a_block"), [(False, 1), (True, 2)])
def test_every_block_is_compiled_and_equal_blocks_share_their_graphs(
    mode, breaks, graphs_of_a_block
):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = compile_blocks.apply(Model(breaks), Compile(enable=True, backend=backend))
    activation_checkpoint.apply(model, ActivationCheckpoint(mode=mode))
    x = torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert len(graphs) == graphs_of_a_block


def test_another_number_of_documents_or_frames_compiles_nothing_again():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = Qwen3VL(FLAVORS["debug"])
    init_weights(model, 0, 0.02)
    compile_blocks.apply(model, Compile(enable=True, backend=backend))
    compiled = []
    for doc_lens, grids in (
        ([64], [(1, 4, 4)]),
        ([40, 24], [(1, 4, 8)]),  # other sizes: the graphs become dynamic
        ([10, 20, 34], [(1, 4, 4), (1, 6, 4)]),
        ([1] * 4 + [60], [(1, 2, 2)] * 5),
        ([16] * 4, [(1, 4, 4)] * 3),
        ([8] * 8, [(1, 6, 6)] * 2),
    ):
        patches = sum(t * h * w for t, h, w in grids)
        model(batch_of(doc_lens, grids, torch.randn(patches, 1536))).sum().backward()
        compiled.append(len(graphs))
    assert compiled[3:] == [compiled[2]] * 3


def batch_of(doc_lens, grids, pixels_NC):
    length = sum(doc_lens)
    return Batch(
        tokens_BS=torch.zeros(1, length, dtype=torch.long),
        labels_BS=torch.zeros(1, length, dtype=torch.long),
        positions_3BS=torch.zeros(3, 1, length, dtype=torch.long),
        valid_BS=torch.ones(1, length, dtype=torch.bool),
        doc_lens=doc_lens,
        pixels_NC=pixels_NC,
        grids=grids,
        visual_index_M=torch.arange(len(pixels_NC) // 4),
    )


def test_nothing_is_compiled_when_it_is_switched_off():
    model = compile_blocks.apply(Model(), Compile(enable=False, backend="unknown"))
    gradients(model)
