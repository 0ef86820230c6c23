"""The experts' products in float8: what a recipe rounds, in plain PyTorch or by torchao's kernels.

Both operands of a product are rounded to float8 e4m3 (4 bits of exponent, 3 of mantissa, at most
448), with scales that lie along the dimension that the product sums over. A step has three:

                        float8: one scale for           mxfp8: one scale for
    y  = x_RK  @ w_EKN  a row of x, a column of w       32 neighbours along K
    dx = dy_RN @ w^T    a row of dy, a row of w         32 neighbours along N
    dw = x^T   @ dy     a column of x, of dy, within    32 neighbours along R; groups start at
                        a group's rows                  multiples of 32, so no block has two

A scale is the smallest power of two that brings the largest number of its block to 448 or below:
multiplying by it rounds nothing. Gradients are e4m3 too. So do torchao's `fp8_rowwise` (scales
rounded to powers of two) and `mxfp8_rceil`; the block format is that of the OCP Microscaling
Formats specification 1.0, its scale (E8M0) being an exponent.

The weight's gradient depends on which rows are rounded together, so in the last bits on the mesh.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.experts import grouped_matmul
from titan_vlm.models.moe.layout import ALIGN, Layout

# R rows, E experts, K and N what a product sums over and gives

E4M3_MAX = 448.0
Product = Callable[[Tensor, Tensor, Layout], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How numbers share scales, and what runs it.

    block           neighbours with one scale; None: a whole row or column
    least_exponent  of a scale: of float8's, torchao takes the largest number to be 1e-12 at least
    function        of torchao.prototype.moe_training
    capabilities    major numbers of the compute capabilities that its kernels are written for
    hardware        these in words
    widths          both widths of an expert must be multiples of it
    rows            a group's rows must be multiples of it
    """

    block: int | None
    least_exponent: int
    function: str
    capabilities: tuple[int, ...]
    hardware: str
    widths: int
    rows: int


RECIPES = {
    "float8": Recipe(
        block=None,
        least_exponent=-48,
        function="_to_fp8_rowwise_then_scaled_grouped_mm",
        capabilities=(9, 10),
        hardware="an NVIDIA GPU of compute capability 9.0 or 10.x (H100, H200, B200)",
        widths=16,
        rows=ALIGN,
    ),
    # torchao 0.18 writes scales in tiles of 128 rows and 4 blocks.
    "mxfp8": Recipe(
        block=32,
        least_exponent=-127,
        function="_to_mxfp8_then_scaled_grouped_mm",
        capabilities=(10,),
        hardware="an NVIDIA GPU of compute capability 10.x (B200, GB200)",
        widths=128,
        rows=128,
    ),
}


# ---------------------------------------------------------------------------- in plain PyTorch


def emulated(name: str) -> Product:
    """The product of recipe `name` on any device: operands rounded, then multiplied as they were.

    For x [R, K] and weight [E, K, N] of any floating type; mxfp8 wants K and N multiples of 32.
    """
    recipe = RECIPES[name]
    return lambda x_RK, weight_EKN, layout: _Emulated.apply(x_RK, weight_EKN, layout, recipe)


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RK: Tensor, weight_EKN: Tensor, layout: Layout, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x_RK, weight_EKN)
        ctx.layout, ctx.recipe = layout, recipe
        return grouped_matmul(quantize(x_RK, 1, recipe), quantize(weight_EKN, 1, recipe), layout)

    @staticmethod
    def backward(ctx, grad_RN: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x_RK, weight_EKN), layout, recipe = ctx.saved_tensors, ctx.layout, ctx.recipe
        weight_ENK = quantize(weight_EKN, 2, recipe).mT
        grad_x_RK = grouped_matmul(quantize(grad_RN, 1, recipe), weight_ENK, layout)
        # The weight's gradient is that of an ordinary product of the rounded rows.
        with torch.enable_grad():
            any_EKN = weight_EKN.detach().requires_grad_()
            y_RN = grouped_matmul(quantize_groups(x_RK, layout, recipe), any_EKN, layout)
        grad_RN = quantize_groups(grad_RN, layout, recipe)
        (grad_EKN,) = torch.autograd.grad(y_RN, any_EKN, grad_RN)
        return grad_x_RK, grad_EKN, None, None


def quantize(x: Tensor, dim: int, recipe: Recipe) -> Tensor:
    """`x` as float8 holds it, with one scale for each block along `dim`; type and shape stay."""
    block = recipe.block or x.shape[dim]
    blocks = x.unflatten(dim, (x.shape[dim] // block, block))
    return _round(blocks, blocks.abs().amax(dim + 1, keepdim=True), recipe).flatten(dim, dim + 1)


def quantize_groups(x_RN: Tensor, layout: Layout, recipe: Recipe) -> Tensor:
    """The same along the rows, no block reaching from one expert's rows to another's."""
    if recipe.block:
        return quantize(x_RN, 0, recipe)
    rows = torch.arange(len(x_RN), device=x_RN.device)
    # Rows past the last group are nobody's and may be anything: they are a group of their own.
    group_R = torch.bucketize(rows, layout.ends_E, right=True)
    amax_EN = x_RN.new_zeros(len(layout.ends_E) + 1, x_RN.shape[1])
    index_RN = group_R.unsqueeze(1).expand_as(x_RN)
    amax_EN = amax_EN.scatter_reduce(0, index_RN, x_RN.abs(), "amax")
    return _round(x_RN, amax_EN[group_R], recipe)


def _round(x: Tensor, amax: Tensor, recipe: Recipe) -> Tensor:
    """`x` rounded with the scales for the largest numbers `amax`; not-finite ones stay visible."""
    amax = amax.float()
    mantissa, exponent = torch.frexp(amax / E4M3_MAX)
    exponent = exponent - (mantissa == 0.5).int()  # a power of two: frexp gives half of the next
    exponent = exponent.clamp(recipe.least_exponent, 127)
    scale = torch.where(amax.isfinite(), _power_of_two(-exponent), torch.nan)
    # Older PyTorch makes NaN of what is too large.
    low = (x.float() * scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (low.float() * _power_of_two(exponent)).to(x.dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent from its bits, so exactly; 0 for -127, as where small numbers are flushed."""
    return ((exponent + 127) << 23).view(torch.float32)


# ---------------------------------------------------------------------------- by torchao


def by_torchao(name: str, device_type: str) -> Product:
    """The product of recipe `name` by torchao's kernels, for bfloat16 on a GPU.

    Their weights are the other way round in memory: a copy of them is made for each product. The
    backward pass needs it again; with activation checkpointing there is one block's at a time.

    Raises:
        ConfigError: this is no such GPU, torchao is missing or too old, or a trial fails.
    """
    recipe = RECIPES[name]
    try:
        _check_device(recipe, device_type)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what this GPU has no use for
            product = partial(transposed_product, _load(recipe))
        _try(product, recipe)
    except Exception as error:  # of every kind: the library's, its compiler's, the driver's
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(
            f'quantize.experts = "{name}" needs the package torchao >= 0.17 and {recipe.hardware}: '
            f'{reason}; use "none", or try the numbers with quantize.emulate = true'
        ) from error
    return product


def _check_device(recipe: Recipe, device_type: str) -> None:
    if device_type != "cuda":
        raise RuntimeError(f"this run is on {device_type}")
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip or major not in recipe.capabilities:
        raise RuntimeError(f"{torch.cuda.get_device_name()} ({major}.{minor}) is none")


def _load(recipe: Recipe) -> Callable[..., Tensor]:
    import torchao.prototype.moe_training as library

    function = getattr(library, recipe.function, None)
    padding = "pad_token_groups_for_grouped_mm"
    if function is None or padding not in inspect.signature(function).parameters:
        raise ImportError(f"the torchao that is installed has no {recipe.function} with {padding}")
    return partial(function, out_dtype=torch.bfloat16, **{padding: False})


def transposed_product(
    function: Callable[..., Tensor], x_RK: Tensor, weight_EKN: Tensor, layout: Layout
) -> Tensor:
    """`function(x, weight, offs=ends)`, which wants row-major rows and column-major weights."""
    if len(x_RK) == 0:
        return grouped_matmul(x_RK, weight_EKN, layout)
    y_RN = function(x_RK.contiguous(), weight_EKN.mT.contiguous().mT, offs=layout.ends_E)
    if y_RN.requires_grad:
        y_RN.register_hook(lambda grad_RN: grad_RN.contiguous())
    return y_RN


def _try(product: Product, recipe: Recipe) -> None:
    """One small product there and back: what is missing is said now, not in the first step."""
    size = recipe.rows
    x_RK = torch.ones(size, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight_EKN = torch.ones(1, 128, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    ends_E = torch.tensor([size], dtype=torch.int32, device="cuda")
    nobody = torch.empty(0, device="cuda")
    y_RN = product(x_RK, weight_EKN, Layout(nobody, nobody, nobody, ends_E, None))
    y_RN.sum().backward()
    torch.cuda.synchronize()
    if not (y_RN == 128).all() or not (x_RK.grad == 128).all():
        raise RuntimeError("a product of ones comes out wrong")
