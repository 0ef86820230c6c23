"""Parameter groups, freezing and gradient clipping."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from titan_vlm.config import Optimizer
from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.layer import MoE
from titan_vlm.training.optimizer import build_optimizer, clip_grad_norm, freeze_parameters


class Tiny(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.vision = nn.ModuleDict(
            {"pos_embed": nn.Embedding(4, 3), "proj": nn.Linear(3, 3), "norm": nn.LayerNorm(3)}
        )
        self.text = nn.ModuleDict({"embed": nn.Embedding(5, 3), "q": nn.Linear(3, 3, bias=False)})
        self.lm_head = nn.Linear(3, 5, bias=False)
        if tied:
            self.lm_head.weight = self.text.embed.weight

    def branches(self):
        names = [name for name, _ in self.named_parameters()]
        return {
            "vision": [name for name in names if name.startswith("vision.")],
            "text": [name for name in names if not name.startswith("vision.")],
        }


def settings(**changes):
    return Optimizer(lr=1e-3, weight_decay=0.1, **changes)


def names_by_group(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {g["name"]: {names[p] for p in g["params"]} for g in optimizer.param_groups}


def test_biases_of_experts_do_not_decay():
    model = Tiny()
    model.text = MoE(4, 4, 2, 1, MoEConfig(expert_bias=True))
    optimizer = build_optimizer(model, settings())
    kept = {name for name in names_by_group(model, optimizer)["base"] if "text" in name}
    assert kept == {"text.router.weight", "text.experts.gate_up", "text.experts.down"}


def test_only_matrices_decay_and_the_position_table_does_not():
    model = Tiny()
    optimizer = build_optimizer(model, settings())
    assert names_by_group(model, optimizer)["base/no_decay"] == {
        "vision.pos_embed.weight",
        "vision.proj.bias",
        "vision.norm.weight",
        "vision.norm.bias",
    }
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {"base": 0.1, "base/no_decay": 0.0}
    assert all(group["fused"] for group in optimizer.param_groups)


def test_a_branch_and_a_pattern_get_their_rates_and_the_pattern_wins():
    model = Tiny()
    rates = {"*.proj.*": 3e-5, "vision": 1e-5}
    optimizer = build_optimizer(model, settings(branch_lr=rates))
    groups = names_by_group(model, optimizer)
    assert groups["*.proj.*"] == {"vision.proj.weight"}
    assert groups["*.proj.*/no_decay"] == {"vision.proj.bias"}
    assert "vision.norm.weight" in groups["vision/no_decay"]
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "*.proj.*": 3e-5,
        "*.proj.*/no_decay": 3e-5,
        "vision/no_decay": 1e-5,
        "base": 1e-3,
    }


def test_a_tied_parameter_is_in_one_group_once_and_answers_to_both_names():
    model = Tiny(tied=True)
    optimizer = build_optimizer(model, settings(branch_lr={"lm_head.*": 1e-4}))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))
    assert names_by_group(model, optimizer)["lm_head.*"] == {"text.embed.weight"}


@pytest.mark.parametrize("patterns", [["vision"], ["vision.*"]])
def test_a_frozen_branch_is_not_trained(patterns):
    model = Tiny()
    freeze_parameters(model, patterns)
    optimizer = build_optimizer(model, settings())
    trained = set.union(*names_by_group(model, optimizer).values())
    assert trained == {"text.embed.weight", "text.q.weight", "lm_head.weight"}
    assert not any(p.requires_grad for p in model.vision.parameters())


def test_a_name_that_matches_nothing_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"training.freeze: 'vison' .* nearest is 'vision'"):
        freeze_parameters(Tiny(), ["vison"])
    with pytest.raises(ConfigError, match=r"optimizer.branch_lr: 'txt.q\.\*' .*'text.q.weight'"):
        build_optimizer(Tiny(), settings(branch_lr={"txt.q.*": 1.0}))


@pytest.mark.parametrize("rates", [{"vision": 1e-5}, {"lm_head.*": 1e-5, "lm_head.w*": 1e-4}])
def test_a_rate_that_nothing_learns_at_is_refused(rates):
    model = Tiny()
    freeze_parameters(model, ["vision"])
    with pytest.raises(ConfigError, match=f"{next(iter(rates))!r} is the rate of no parameter"):
        build_optimizer(model, settings(branch_lr=rates))


def test_freezing_everything_is_refused():
    with pytest.raises(ConfigError, match="freezes every parameter"):
        freeze_parameters(Tiny(), ["vision", "text"])


def filled(*shapes):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return parameters


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clipping_equals_the_norm_of_all_gradients_as_one_vector(max_norm):
    parameters = [*filled((3, 4), (5,)), nn.Parameter(torch.zeros(2))]  # the last has no gradient
    before = torch.cat([p.grad.flatten() for p in parameters[:2]])
    total = clip_grad_norm(iter(parameters), max_norm)
    torch.testing.assert_close(total, before.norm())
    after = torch.cat([p.grad.flatten() for p in parameters[:2]])
    scale = min(1.0, 0.5 / (before.norm().item() + 1e-6)) if max_norm == 0.5 else 1.0
    torch.testing.assert_close(after, before * scale)


def test_no_gradient_at_all_has_norm_zero():
    assert clip_grad_norm([nn.Parameter(torch.zeros(2))], 1.0) == 0


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_parameters_of_different_meshes_are_clipped_and_stepped_together(world_of_one):
    plain = filled((4, 4), (6, 2), (3, 3))
    expected = torch.cat([p.grad.flatten() for p in plain]).norm()
    line, grid = init_device_mesh("cpu", (1,)), init_device_mesh("cpu", (1, 1))
    placed = [
        nn.Parameter(distribute_tensor(plain[0].detach(), line, [Shard(0)])),
        nn.Parameter(distribute_tensor(plain[1].detach(), grid, [Shard(0), Replicate()])),
        plain[2],
    ]
    placed[0].grad = distribute_tensor(plain[0].grad, line, [Shard(0)])
    placed[1].grad = distribute_tensor(plain[1].grad, grid, [Shard(0), Replicate()])
    total = clip_grad_norm(placed, 1.0)
    torch.testing.assert_close(total, expected)

    model = nn.ParameterList(placed)
    model.branches = lambda: {"all": [name for name, _ in model.named_parameters()]}
    optimizer = build_optimizer(model, settings())
    optimizer.step()
    assert len(optimizer.param_groups) == 3
    assert all(p.full_tensor().any() for p in placed[:2])
