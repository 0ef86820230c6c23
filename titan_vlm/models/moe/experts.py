"""The experts: E SwiGLU or GELU layers as two grouped matmuls.

The one place that chooses how a grouped matmul runs:

- uniform layout: one `bmm` (any dtype);
- ragged layout: `F.grouped_mm` (bf16 and float32; bf16 only on CUDA);
- where there is no such kernel (float64; float32 on CUDA; rows that are not whole 16 bytes): one
  matmul per group, same layout.

A quantised one (`quantize.py`) takes its place from outside, as the `matmul` of an `Experts`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_vlm.models.moe.layout import Layout


class Experts(nn.Module):
    """down(silu(gate(x)) * up(x) * weight) for each expert's rows, or down(gelu(up(x)) * weight) as
    in vision towers.

    The routing weight multiplies the hidden activation instead of the output: the same number,
    at width F instead of D, and its gradient needs no saved output.

    gate_up [E, D, 2F], gate first; down [E, F, D]: the layout of the published checkpoints. With
    `bias`, one [E, 1, ...] for each. Of GELU experts the first is called up, [E, D, F].
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        out: int | None = None,
        bias: bool = False,
        activation: str = "swiglu",
    ):
        super().__init__()
        out = out or width
        self.matmul = grouped_matmul
        first, units = {"swiglu": ("gate_up", 2 * hidden), "gelu": ("up", hidden)}[activation]
        self.activate = {"swiglu": WeightedSwiGLU.apply, "gelu": weighted_gelu}[activation]
        self.register_parameter(first, nn.Parameter(torch.empty(num_experts, width, units)))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, out))
        if bias:
            bias_E1N = nn.Parameter(torch.empty(num_experts, 1, units))
            self.register_parameter(f"{first}_bias", bias_E1N)
            self.down_bias = nn.Parameter(torch.empty(num_experts, 1, out))

    def forward(self, x_RD: Tensor, layout: Layout) -> Tensor:
        first_RF = self.matmul(x_RD, self.first, layout)
        if not hasattr(self, "down_bias"):
            hidden_RF = self.activate(first_RF, layout.weights_R)
            return self.matmul(hidden_RF, self.down, layout)
        num_rows = len(x_RD)
        first_RF = first_RF + _EachRow.apply(self.first_bias, layout.ends_E, num_rows)
        hidden_RF = self.activate(first_RF, layout.weights_R)
        bias_RD = _EachRow.apply(self.down_bias, layout.ends_E, num_rows)
        weights_R1 = layout.weights_R.to(bias_RD.dtype).unsqueeze(-1)
        return self.matmul(hidden_RF, self.down, layout) + bias_RD * weights_R1

    @property
    def first(self) -> Tensor:
        """The matrices that tokens meet first."""
        return self.gate_up if hasattr(self, "gate_up") else self.up

    @property
    def first_bias(self) -> Tensor:
        return self.gate_up_bias if hasattr(self, "gate_up") else self.up_bias


def grouped_matmul(x_RK: Tensor, weight_EKN: Tensor, layout: Layout) -> Tensor:
    """Each expert's rows times its own matrix: [R, N]. Rows of no group are undefined."""
    if layout.group is not None:
        groups_EGK = x_RK.unflatten(0, (weight_EKN.shape[0], layout.group))
        return torch.bmm(groups_EGK, weight_EKN).flatten(0, 1)
    if _has_kernel(x_RK, weight_EKN) and x_RK.shape[0] > 0:
        return F.grouped_mm(x_RK, weight_EKN, offs=layout.ends_E)
    return _matmul_per_group(x_RK, weight_EKN, layout.ends_E)


def _has_kernel(x_RK: Tensor, weight_EKN: Tensor) -> bool:
    whole = all(width * x_RK.itemsize % 16 == 0 for width in weight_EKN.shape[1:])
    float32 = x_RK.dtype == torch.float32 and x_RK.device.type == "cpu"
    return whole and (float32 or x_RK.dtype == torch.bfloat16)


def _matmul_per_group(x_RK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    groups = [x_RK[a:b] @ w for a, b, w in zip(starts, ends, weight_EKN.unbind(), strict=True)]
    unused = x_RK.shape[0] - ends[-1]
    return torch.cat([*groups, x_RK.new_zeros(unused, weight_EKN.shape[-1])])


class _EachRow(torch.autograd.Function):
    """The bias of each row's expert: [E, 1, N] -> [R, N]. Rows past the last group are nobody's:
    they get the last expert's, and their gradient, which may be undefined, goes to none.

    The backward pass sums in float32, in the order of the rows: that of `index_select` on CUDA adds
    in bfloat16, in any order, and 1 added to 256 is lost.
    """

    @staticmethod
    def forward(ctx, bias_E1N: Tensor, ends_E: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(ends_E)
        rows_R = torch.arange(num_rows, device=ends_E.device)
        experts_R = torch.bucketize(rows_R, ends_E, right=True).clamp(max=len(ends_E) - 1)
        return bias_E1N.squeeze(1).index_select(0, experts_R)

    @staticmethod
    def backward(ctx, grad_RN: Tensor) -> tuple[Tensor, None, None]:
        (ends_E,) = ctx.saved_tensors
        rows_R = torch.arange(len(grad_RN), device=ends_E.device, dtype=ends_E.dtype)
        starts = F.pad(ends_E, (1, 0))  # a bag more than experts: nobody's rows
        sums = F.embedding_bag(rows_R, grad_RN.contiguous(), starts, mode="sum")
        return sums[:-1].unsqueeze(1), None, None


class WeightedSwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight, [R, 2F] -> [R, F]; keeps `gate_up` and silu(gate) for backward.

    The gradient of `gate_up` takes its place: memory that is in cache and that nobody reads any
    more. So there is one backward pass; autograd refuses a second one.

    Weights come, and their gradients leave, in float32; a factor is rounded to the dtype of the
    rows, as every other number here is: one rounding of four. In bfloat16 on a CPU a float32 factor
    would cost two fifths of the layer's time (PyTorch casts a copy of the rows), two bfloat16
    factors that sum to it a sixth; the error of the layer's output would shrink from 0.48 to 0.46
    percent.
    """

    @staticmethod
    def forward(ctx, gate_up_RF: Tensor, weights_R: Tensor) -> Tensor:
        gate, up = gate_up_RF.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up_RF, activated, weights_R)
        weights = weights_R.to(gate.dtype).unsqueeze(-1)
        return (activated * up).mul_(weights)

    @staticmethod
    def backward(ctx, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
        gate_up_RF, activated, weights_R = ctx.saved_tensors
        gate, up = gate_up_RF.chunk(2, -1)
        grad_activated = grad_RF * up
        torch.mul(grad_RF, activated, out=up)
        # A product with ones sums in float32 and reads its input once; `sum(dtype=float32)` of
        # bfloat16 on a CPU first casts a copy of it, and takes as long as a matmul.
        grad_weights = activated.mul_(grad_activated) @ activated.new_ones(activated.shape[-1])
        torch.ops.aten.silu_backward.grad_input(grad_activated, gate, grad_input=gate)
        gate_up_RF.mul_(weights_R.to(gate.dtype).unsqueeze(-1))
        return gate_up_RF, grad_weights.to(weights_R.dtype)


def weighted_gelu(up_RF: Tensor, weights_R: Tensor) -> Tensor:
    """gelu_tanh(up) * weight, [R, F]."""
    return F.gelu(up_RF, approximate="tanh") * weights_R.to(up_RF.dtype).unsqueeze(-1)
