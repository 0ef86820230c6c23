"""Products together with their exchange, against the plain module on the whole sequence."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.small_run import Silent, small_config
from titan_vlm import distributed, train
from titan_vlm.parallel import async_tensor, tensor
from titan_vlm.parallel.tensor import STYLES, Split


class Pair(nn.Module):
    """As an attention or a feed-forward layer: columns, something between, a row; with biases."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x_BSD):
        x_TD = x_BSD.flatten(0, 1)
        return self.down(self.a(x_TD).tanh() * self.b(x_TD)).unflatten(0, x_BSD.shape[:2])


def test_a_pair_with_biases_equals_the_plain_module(world):
    for errors in world.run(2, errors_of_a_pair):
        assert errors.keys() == {"out", "x", *dict(Pair().named_parameters())}
        assert max(errors.values()) < 1e-12, errors


def errors_of_a_pair():
    distributed.start("cpu")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    plain = Pair().double()
    module = Pair().double()
    module.load_state_dict(plain.state_dict())
    split = Split(mesh, mesh.get_group(), True)
    for name, style in (("a", "column"), ("b", "column"), ("down", "row")):
        STYLES[style](getattr(module, name), split)
    async_tensor.prepare(mesh)
    async_tensor.pair(module, [module.a, module.b], module.down, split.group)

    whole = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    wanted = plain(whole)
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()
    positions = slice(2 * mesh.get_local_rank(), 2 * mesh.get_local_rank() + 2)
    part = whole.detach()[:, positions].clone().requires_grad_()
    out = module(part)
    (out * weights[:, positions]).sum().backward()
    errors = {"out": out - wanted[:, positions], "x": part.grad - whole.grad[:, positions]}
    for name, parameter in module.named_parameters():
        errors[name] = parameter.grad.full_tensor() - plain.get_parameter(name).grad
    return {name: error.abs().max().item() for name, error in errors.items()}


def test_the_setting_reaches_attention_and_dense_layers(world, tmp_path):
    changes = {"parallelism__tp": "2", "parallelism__async_tp": "true"}
    for fused, separate in world.run(2, exchanges, tmp_path, changes):
        assert fused == 5  # four attention layers and a dense one
        assert separate == 1  # before the head


def exchanges(output, changes):
    """How many gathers of positions in a forward pass are part of a product, how many are not."""
    run = train.prepare(small_config(output, training__global_batch_size="1", **changes))
    fused, separate = [], []
    inner, outer = async_tensor.gather_and_multiply, tensor.collectives.gather_partial
    run.model.register_forward_hook(lambda *_: fused.append("end"))
    async_tensor.gather_and_multiply = lambda *args: fused.append("gather") or inner(*args)
    tensor.collectives.gather_partial = lambda *args: separate.append(1) or outer(*args)
    try:
        train.train_step(run, Silent())
    finally:
        async_tensor.gather_and_multiply = inner
        tensor.collectives.gather_partial = outer
    return fused.index("end"), len(separate)
