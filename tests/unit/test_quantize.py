"""Quantised products against loops over single numbers, written from the formats' definition.

OCP Microscaling Formats specification 1.0: e4m3 has 4 bits of exponent (bias 7) and 3 of mantissa,
no infinity, 448 as its largest number; an E8M0 scale is a power of two from 2^-127 to 2^127.
"""

import math
import sys
from bisect import bisect_left
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.small_run import curve, run, small_config
from titan_vlm.assembly import assemble, build_model
from titan_vlm.config import Quantize, load_config
from titan_vlm.errors import ConfigError
from titan_vlm.models.init import init_weights
from titan_vlm.models.moe import quantize as recipes
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.experts import grouped_matmul
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.layout import Layout, make_layout
from titan_vlm.models.moe.quantize import RECIPES, by_torchao, emulated, transposed_product
from titan_vlm.models.moe.routing import Routing
from titan_vlm.models.moe.tokens import tokens_of
from titan_vlm.parallel import quantize
from titan_vlm.parallelize import parallelize

NAMES = list(RECIPES)
KINDS = ["uniform", "ragged"]
K, N, EXPERTS = 64, 96, 4
COUNTS = {"some": [33, 5, 70, 20], "an empty group": [40, 0, 7, 0], "one row": [0, 1, 0, 0]}


# ---------------------------------------------------------------------------- the definition

# Every number of e4m3 that is not negative, ascending: number i has the bits i.
E4M3 = [
    math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
    for exponent in range(16)
    for mantissa in range(8)
    if (exponent, mantissa) != (15, 7)  # NaN
]


def to_e4m3(value: float) -> float:
    """The nearest number; of two as near the one with even bits; never more than the largest."""
    size = min(abs(value), E4M3[-1])
    above = bisect_left(E4M3, size)
    below = max(above - 1, 0)
    nearest = min((above, below), key=lambda i: (abs(E4M3[i] - size), i % 2))
    return math.copysign(E4M3[nearest], value)


def quantized_block(values: list[float], name: str) -> list[float]:
    """Numbers that share a scale, the smallest that brings them to 448 or below."""
    amax = max(map(abs, values))
    exponent = {"float8": -48, "mxfp8": -127}[name]
    while amax > math.ldexp(448.0, exponent):
        exponent += 1
    return [math.ldexp(to_e4m3(math.ldexp(v, -exponent)), exponent) for v in values]


def quantized_rows(x: Tensor, name: str) -> Tensor:
    """Each row of a matrix: one block, or blocks of 32."""
    rows = []
    for row in x.tolist():
        size = {"float8": len(row), "mxfp8": 32}[name]
        blocks = [row[i : i + size] for i in range(0, len(row), size)]
        rows.append([v for block in blocks for v in quantized_block(block, name)])
    return torch.tensor(rows, dtype=torch.float64)


def naive(x: Tensor, weight: Tensor, grad: Tensor, layout: Layout, name: str):
    """The product, the gradients of x and of the weight: each operand rounded along the sum."""
    y, dx, dw = torch.zeros_like(grad), torch.zeros_like(x), torch.zeros_like(weight)
    start = 0
    for e, end in enumerate(layout.ends_E.tolist()):
        if end > start:
            rows, w = slice(start, end), weight[e]
            y[rows] = quantized_rows(x[rows], name) @ quantized_rows(w.T, name).T
            dx[rows] = quantized_rows(grad[rows], name) @ quantized_rows(w, name).T
            dw[e] = quantized_rows(x[rows].T, name) @ quantized_rows(grad[rows].T, name).T
        start = end
    return y, dx, dw


# ---------------------------------------------------------------------------- products


def make_case(kind: str, counts: list[int], monkeypatch, spread: float = 6.0, align: int = 32):
    """x, weight and gradient whose numbers span many powers of two, all exact in bfloat16."""
    limit = {"uniform": float("inf"), "ragged": -1000.0}[kind]
    monkeypatch.setattr("titan_vlm.models.moe.layout.spare_rows", lambda dtype: limit)
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    routing = Routing(torch.arange(len(experts)), experts, torch.ones(len(experts)), len(counts))
    layout = make_layout(routing, torch.bfloat16, align)
    assert (layout.group is not None) == (kind == "uniform")
    generator = torch.Generator().manual_seed(sum(counts))

    def numbers(*shape):
        x = torch.randn(*shape, generator=generator)
        x = x * torch.exp2(spread * torch.randn(*shape, generator=generator))
        return x.bfloat16().double()

    rows = len(layout.source_R)
    return numbers(rows, K), numbers(len(counts), K, N), numbers(rows, N), layout


def products(product, x, weight, grad, layout):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = product(x, weight, layout)
    return y, *torch.autograd.grad(y, (x, weight), grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products_are_those_of_the_formats_definition(name, kind, counts, monkeypatch):
    case = make_case(kind, counts, monkeypatch)
    expected = naive(*case, name)
    for ours, theirs in zip(products(emulated(name), *case), expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * float(theirs.abs().max()))


EDGES = {
    "nothing": [0.0, -0.0],
    "the largest number": [448.0, -1.0],
    "a little more": [450.0, -449.0],
    "halves of the last bit": [448.0, 17.0, 19.0, -21.0, 0.0009765625, 0.0029296875],
    "below the smallest number": [448.0, 0.0009, -0.0001],
    "powers of two": [2.0**40, 2.0**39, 2.0**20],
    "tiny": [1e-11, 3e-13, 1e-20],
    "where float8's scale ends": [1e-12, 1e-14, 1e-20],
    "below it": [3e-16, 1e-17],
    "where mxfp8's begins": [2.0**-115, 2.0**-118],
    "huge": [3e38, -1e38, 1e30],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("edge", EDGES)
def test_rounding_at_the_edges(name, edge):
    row = torch.zeros(1, 32, dtype=torch.float32)
    row[0, : len(EDGES[edge])] = torch.tensor(EDGES[edge])
    ours = recipes.quantize(row, 1, RECIPES[name])
    assert torch.equal(ours.double(), quantized_rows(row.double(), name))
    assert torch.equal(recipes.quantize(row.T, 0, RECIPES[name]).T, ours)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_at_all(name, monkeypatch):
    x, weight, grad, layout = make_case("ragged", [0] * EXPERTS, monkeypatch)
    y, dx, dw = products(emulated(name), x, weight, grad, layout)
    assert y.shape == (0, N) and dx.shape == (0, K) and torch.equal(dw, torch.zeros_like(weight))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_exact_as_its_sums(name, kind, monkeypatch):
    x, weight, grad, layout = make_case(kind, COUNTS["some"], monkeypatch, spread=1.0)
    exact = products(emulated(name), x, weight, grad, layout)
    plain = products(grouped_matmul, x, weight, grad, layout)
    half = [t.bfloat16() for t in (x, weight, grad)]
    for ours, theirs, unquantised in zip(
        products(emulated(name), *half, layout), exact, plain, strict=True
    ):
        size = unquantised.norm()
        assert ours.dtype == torch.bfloat16
        # What is rounded is a float8 number times a power of two, which bfloat16 holds.
        assert (ours.double() - theirs).norm() / size < 2e-3
        # 3 bits of mantissa: 2^-4 at most, half of that on average, of both operands.
        assert 0.01 < (ours.double() - unquantised).norm() / size < 0.06


def test_float8_and_mxfp8_differ_where_one_number_dwarfs_a_row(monkeypatch):
    x, weight, grad, layout = make_case("uniform", COUNTS["some"], monkeypatch, spread=0.0)
    x[:, 0] = 2.0**20
    weight[:, 0] = 0
    exact = grouped_matmul(x, weight, layout)
    errors = {n: (emulated(n)(x, weight, layout) - exact).norm() / exact.norm() for n in NAMES}
    assert errors["float8"] > 0.99  # all others are below the smallest number of the row's scale
    assert 0.6 < errors["mxfp8"] < 0.8  # of two blocks one is lost: the root of a half


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(name, kind, value, monkeypatch):
    x, weight, grad, layout = make_case(kind, COUNTS["some"], monkeypatch, spread=0.0)
    grad[3, 5] = value
    _, dx, dw = products(emulated(name), x, weight, grad, layout)
    assert not dx[3].isfinite().any() and dx[4:].isfinite().all()
    assert not dw[0, :, 5].isfinite().any() and dw[1:].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_nobody_change_nothing(name, monkeypatch):
    x, weight, grad, layout = make_case("ragged", COUNTS["some"], monkeypatch)
    more = torch.full((64, K), math.nan).double(), torch.full((64, N), math.nan).double()
    y, dx, dw = products(emulated(name), x, weight, grad, layout)
    x, grad = torch.cat((x, more[0])), torch.cat((grad, more[1]))
    y2, dx2, dw2 = products(emulated(name), x, weight, grad, layout)
    assert torch.equal(y2[: len(y)], y) and torch.equal(dx2[: len(dx)], dx)
    assert torch.equal(dw2, dw)


def test_groups_are_aligned_as_a_recipe_asks(monkeypatch):
    for kind in KINDS:
        *_, layout = make_case(kind, [33, 0, 129, 1], monkeypatch, align=128)
        assert all(end % 128 == 0 for end in layout.ends_E.tolist())
        assert len(layout.source_R) == (4 * 256 if kind == "uniform" else 128 + 256 + 128)


# ---------------------------------------------------------------------------- layers and models


class Counted:
    """A product that remembers the weights it was called with."""

    def __init__(self, product):
        self.product, self.weights = product, []

    def __call__(self, x_RK, weight_EKN, layout):
        self.weights.append(tuple(weight_EKN.shape))
        return self.product(x_RK, weight_EKN, layout)


@pytest.mark.parametrize("name", NAMES)
def test_router_and_shared_expert_are_not_quantised(name):
    """Of a layer whose experts give nothing, quantised or not, every bit is the same."""
    layer = MoE(64, 32, EXPERTS, 2, MoEConfig(shared_width=64, shared_gate=True)).bfloat16()
    init_weights(layer, 0, std=0.3)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = tokens_of([40], None, torch.ones(40, dtype=torch.bool))

    def results():
        layer.zero_grad()
        y = layer(x, tokens)
        y.float().square().sum().backward()
        return y, layer.shared.mlp.down.weight.grad, layer.router.load_E.clone()

    with_experts = results()[0]
    with torch.no_grad():
        layer.experts.down.zero_()
    plain = results()
    layer.experts.matmul = Counted(emulated(name))
    for ours, theirs in zip(results()[:2], plain[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(layer.router.load_E, plain[2] / 2 * 3)  # the same choices a third time
    assert not torch.equal(with_experts, plain[0])
    assert layer.experts.matmul.weights == [(EXPERTS, 64, 64), (EXPERTS, 32, 64)]


def emulate(name: str) -> dict[str, str]:
    return {
        "training__dtype": "bfloat16",
        "quantize__experts": name,
        "quantize__emulate": "true",
        "checkpoint__export_hf": "false",
        "checkpoint__every": "0",
        "training__steps": "12",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_as_in_bfloat16(name, tmp_path, monkeypatch):
    counted = []

    def counting(chosen):
        counted.append(Counted(emulated(chosen)))
        return counted[-1]

    monkeypatch.setattr(quantize, "emulated", counting)
    changes = emulate(name)
    assert run(tmp_path / "quantised", **changes) == 0
    config = small_config(tmp_path, **changes)
    calls = len(counted[0].weights)
    layers = 3  # of debug_moe's 4
    training = config.training.steps * config.training.global_batch_size * 2 * layers
    assert len(counted) == 1 and calls >= training  # and those of the validation
    assert set(counted[0].weights) == {(8, 128, 320), (8, 160, 128)}

    changes |= {"quantize__experts": "none", "quantize__emulate": "false"}
    assert run(tmp_path / "plain", **changes) == 0
    assert len(counted[0].weights) == calls
    ours = torch.tensor([loss for _, loss, _ in curve(tmp_path / "quantised")])
    plain = torch.tensor([loss for _, loss, _ in curve(tmp_path / "plain")])
    assert plain[-1] < 0.9 * plain[0]  # there is something to learn
    assert 0 < ((ours - plain).abs() / plain).max() < 0.01


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_nothing(mode, tmp_path):
    changes = emulate("mxfp8") | {"training__steps": "2"}
    assert run(tmp_path / "kept", **changes) == 0
    assert run(tmp_path / "again", **changes, activation_checkpoint__mode=mode) == 0
    assert curve(tmp_path / "kept") == curve(tmp_path / "again")


@pytest.mark.parametrize("name", NAMES)
def test_experts_of_every_branch_are_quantised(name):
    branches = {"text": MoE(64, 32, 4, 2), "vision": MoE(32, 64, 4, 2, out=96)}
    model = torch.nn.ModuleDict(branches)
    config = Quantize(name, emulate=True)
    quantize.check(model, config)
    assert quantize.apply(model, None, config) is model
    assert all(layer.experts.matmul is not grouped_matmul for layer in branches.values())
    assert MoE(64, 32, 4, 2).experts.matmul is grouped_matmul


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantize.experts", "float8"], 'expected "none" with training.dtype = "float32"'),
        (
            ["--quantize.experts", "mxfp8", "--training.dtype", "float64"],
            'expected "none" with training.dtype = "float64"',
        ),
        (
            ["--quantize.emulate", "true", "--training.dtype", "bfloat16"],
            "quantize.emulate: expected false",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config("qwen_vlm_moe.toml", words)


def test_a_model_that_cannot_be_quantised_is_refused(tmp_path):
    dense = small_config(tmp_path, **emulate("float8") | {"model__flavor": "debug"})
    with pytest.raises(ConfigError, match="this model has no experts"):
        parallelize(build_model(assemble(dense), dense), None, None, dense, 128, None)
    layers = torch.nn.ModuleDict({"moe": MoE(64, 48, 4, 2)})
    quantize.check(layers, Quantize("float8", emulate=True))
    with pytest.raises(ConfigError, match="multiples of 32, the experts of moe have 48"):
        quantize.check(layers, Quantize("mxfp8", emulate=True))
    with pytest.raises(ConfigError, match="multiples of 128, the experts of moe have 48, 64, 96"):
        quantize.check(layers, Quantize("mxfp8"))


@pytest.mark.parametrize(("name", "needed"), [("float8", "9.0 or 10.x"), ("mxfp8", "10.x")])
def test_missing_hardware_is_one_line_at_start(name, needed, tmp_path, capsys):
    changes = emulate(name) | {"quantize__emulate": "false", "run__device": "cpu"}
    changes |= {} if name == "float8" else {"quantize__experts": "float8"}
    assert run(tmp_path, **changes) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "torchao >= 0.17" in line and "this run is on cpu" in line and "quantize.emulate" in line
    with pytest.raises(ConfigError, match=needed):
        by_torchao(name, "cpu")


def pretend_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")


@pytest.mark.parametrize(
    ("name", "capability"), [("float8", (8, 9)), ("float8", (12, 0)), ("mxfp8", (9, 0))]
)
def test_a_gpu_without_such_products_is_refused(name, capability, monkeypatch):
    pretend_gpu(monkeypatch, capability)
    major, minor = capability
    with pytest.raises(ConfigError, match=rf"GPU X \({major}.{minor}\) is none"):
        by_torchao(name, "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_old_torchao_is_refused(name, monkeypatch):
    pretend_gpu(monkeypatch, (10, 0))
    for module in ("torchao", "torchao.prototype", "torchao.prototype.moe_training"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="torchao"):
        by_torchao(name, "cuda")
    for module in ("torchao", "torchao.prototype", "torchao.prototype.moe_training"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    old = sys.modules["torchao.prototype.moe_training"]
    with pytest.raises(ConfigError, match="the torchao that is installed has no"):
        by_torchao(name, "cuda")
    setattr(old, RECIPES[name].function, lambda A, B_t, offs: None)
    with pytest.raises(ConfigError, match="pad_token_groups_for_grouped_mm"):
        by_torchao(name, "cuda")


# ---------------------------------------------------------------------------- torchao


def picky(x, weight, offs):
    """A grouped product that wants its operands as torchao's do."""
    assert x.is_contiguous() and weight.stride(-2) == 1 and offs.dtype == torch.int32
    return Contiguous.apply(torch.nn.functional.grouped_mm(x, weight, offs=offs))


class Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        assert grad.is_contiguous()
        return grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_library_is_given_operands_as_it_wants_them(kind, monkeypatch):
    case = make_case(kind, COUNTS["an empty group"], monkeypatch, spread=0.0)
    x, weight, _, layout = (t.bfloat16() if isinstance(t, Tensor) else t for t in case)
    ones = torch.ones(len(x), N, dtype=torch.bfloat16)
    expected = products(grouped_matmul, x, weight, ones, layout)

    def product(*args):
        return transposed_product(picky, *args)

    odd = x.T.contiguous().T, weight, ones[:1, :1].expand(len(x), N), layout
    for ours, theirs in zip(products(product, *odd), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    x, weight, _, layout = make_case("ragged", [0] * EXPERTS, monkeypatch)
    assert product(x, weight, layout).shape == (0, N)  # a library is not asked for nothing


def test_a_real_product_sets_the_alignment_it_needs(monkeypatch):
    monkeypatch.setattr(quantize, "by_torchao", lambda name, device: grouped_matmul)

    class Mesh:
        class root:
            device_type = "cuda"

    for name, rows in (("float8", 32), ("mxfp8", 128)):
        layer = MoE(128, 128, 4, 2)
        quantize.apply(torch.nn.ModuleDict({"moe": layer}), Mesh, Quantize(name))
        routing = Routing(torch.arange(3), torch.tensor([0, 1, 1]), torch.ones(3), 4)
        _, state = layer.dispatcher.dispatch(torch.ones(3, 128), routing)
        assert (state.layout.ends_E % rows == 0).all() and state.layout.ends_E[0] == rows
    layer.dispatcher = object()
    with pytest.raises(ConfigError, match="the dispatcher of moe, .* aligns groups its own way"):
        quantize.apply(torch.nn.ModuleDict({"moe": layer}), Mesh, Quantize("float8"))


@pytest.mark.parametrize("counts", [COUNTS["some"], [32, 32, 64, 160]])
def test_mxfp8_equals_torchaos_emulation(counts, monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.quantize_.common import KernelPreference

    recipe = RECIPES["mxfp8"]
    function = recipes._load(recipe)
    function.keywords["kernel_preference"] = KernelPreference.EMULATED
    case = make_case("ragged", counts, monkeypatch)
    x, weight, grad, layout = (t.bfloat16() if isinstance(t, Tensor) else t for t in case)
    ours = products(emulated("mxfp8"), x, weight, grad, layout)
    theirs = products(lambda *args: transposed_product(function, *args), x, weight, grad, layout)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_float8_operands_equal_torchaos_reference(monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
    from torchao.prototype.moe_training.utils import torch_to_float8_per_group_colwise

    x, weight, _, layout = make_case("ragged", COUNTS["an empty group"], monkeypatch)
    x, weight, recipe = x.bfloat16(), weight.bfloat16(), RECIPES["float8"]
    e4m3 = torch.float8_e4m3fn
    for tensor, dim in ((x, 1), (weight, 1), (weight, 2)):
        scale = tensor_to_scale(tensor, e4m3, False, None, ScalingGranularity.AXISWISE, dim, True)
        theirs = to_fp8_saturated(tensor.float() * scale, e4m3).float() / scale
        assert torch.equal(recipes.quantize(tensor, dim, recipe), theirs.bfloat16())
    low, scales = torch_to_float8_per_group_colwise(x[:64], layout.ends_E[:1], e4m3, True)
    theirs = low.float() / scales
    assert torch.equal(recipes.quantize_groups(x, layout, recipe)[:64], theirs.bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpus_products_equal_the_emulation(name, monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    if torch.cuda.get_device_capability()[0] not in RECIPES[name].capabilities:
        pytest.skip(f"this GPU has no {name} products")
    product = by_torchao(name, "cuda")
    monkeypatch.setattr(sys.modules[__name__], "K", 128)
    monkeypatch.setattr(sys.modules[__name__], "N", 256)
    case = make_case("ragged", COUNTS["an empty group"], monkeypatch, spread=1.0, align=128)
    x, weight, grad, layout = (t.bfloat16().cuda() if isinstance(t, Tensor) else t for t in case)
    layout.ends_E = layout.ends_E.cuda()
    ours = products(product, x, weight, grad, layout)
    theirs = products(emulated(name), x, weight, grad, layout)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).float().norm() / b.float().norm() < 5e-3
