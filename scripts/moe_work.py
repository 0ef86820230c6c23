"""What `bench_moe.py` and `titan_peer.py`, in its own process, both work on: PyTorch alone.

T tokens, D model width, F expert width, E experts, K top-k
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    skewed: bool = False

    @property
    def forward_flops(self) -> int:
        """Of the matmuls of the experts alone; backward has twice as many."""
        return 6 * self.tokens * self.top_k * self.width * self.hidden


@dataclass
class Weights:
    """Float32. Routers of every side are linear, softmax, top-k, normalised to sum to one."""

    router_ED: Tensor
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor


def make_weights(shape: Shape, device: str) -> Weights:
    """Activations near 1. Skewed: the expert of rank r is asked for about 1/(r + 1) as often."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, device=device)
        return values.div_(math.sqrt(size[-1]))

    router_ED = F.normalize(normal(shape.experts, shape.width))  # all equally popular
    if shape.skewed:
        rank_E = torch.randperm(shape.experts, generator=generator, device=device)
        router_ED[:, 0] = -(rank_E + 1.0).log()  # the feature that is 1 in every token
    expert = (shape.experts, shape.hidden, shape.width)
    return Weights(
        router_ED,
        normal(*expert),
        normal(*expert),
        normal(shape.experts, shape.width, shape.hidden),
    )


def make_tokens(shape: Shape, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """[T, D]; feature 0 is 1."""
    generator = torch.Generator(device).manual_seed(seed + 1)
    x_TD = torch.randn(shape.tokens, shape.width, generator=generator, device=device)
    x_TD[:, 0] = 1
    return x_TD.to(dtype)


@dataclass
class Side:
    """One way to compute the layer: [T, D] -> [T, D], and what else takes a gradient."""

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]


@dataclass
class Seconds:
    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def time_step(side: Side, x_TD: Tensor) -> Seconds:
    """Forward and backward; gradients start anew, as they do after an optimizer step."""
    x_TD = x_TD.detach().requires_grad_()
    grad_TD = x_TD.detach()  # any numbers will do
    read = [mark(x_TD.device)]
    y_TD = side.forward(x_TD)
    read.append(mark(x_TD.device))
    torch.autograd.grad(y_TD, [x_TD, *side.parameters], grad_TD)
    read.append(mark(x_TD.device))
    if x_TD.device.type == "cuda":
        torch.cuda.synchronize()
        return Seconds(*(a.elapsed_time(b) / 1e3 for a, b in zip(read, read[1:], strict=False)))
    return Seconds(read[1] - read[0], read[2] - read[1])


def mark(device: torch.device):
    """A point in time; on CUDA in the stream, so that the host need not wait in between."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def output_and_gradient(side: Side, x_TD: Tensor) -> Tensor:
    """[2, T, D]"""
    x_TD = x_TD.detach().requires_grad_()
    y_TD = side.forward(x_TD)
    (grad_TD,) = torch.autograd.grad(y_TD, [x_TD], x_TD.detach())
    return torch.stack((y_TD.detach().to(x_TD), grad_TD))
