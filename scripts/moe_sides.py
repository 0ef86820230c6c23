"""The ways to compute an MoE layer that `bench_moe.py` compares, each in a process of its own.

A CPU's matmul library keeps the kernels it has compiled: in one process a side would find those
ready that another one has paid for. And TorchTitan may live in another environment. So
`python moe_sides.py NAME` serves one side: it reads a request per line from stdin, a JSON object,
and answers with one on stdout:

    {"build": shape, "dtype": "float32", "experts_dtype": "float32", "device": "cpu"}  ->  {}
    {"warm_up": steps, "seconds": at most}     ->  {}
    {"step": i}                                ->  {"forward": seconds, "backward": seconds}
    {"save": path}                             ->  {}; output and input gradient lie there

A request that fails is answered with {"error": what}. Tokens are a function of the step, weights of
the shape: nobody sends them. Every step has tokens of its own, as in training.

T tokens, D model width, F expert width, E experts, K top-k
"""

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_flush_denormal(True)
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:  # whatever it is: the benchmark says so and goes on without it
            answer = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    def __init__(self, name: str):
        self.name = name
        self.side: Side | None = None

    def answer(self, request: dict) -> dict:
        if "build" in request:
            self.side = None  # the next one needs its memory, and so do the other processes
            if request["device"] == "cuda":
                torch.cuda.empty_cache()
            self.shape, self.device = Shape(**request["build"]), request["device"]
            self.dtype = getattr(torch, request["dtype"])
            experts_dtype = getattr(torch, request["experts_dtype"])
            weights = make_weights(self.shape, self.device)
            self.side = SIDES[self.name](
                self.shape, weights, self.dtype, experts_dtype, self.device
            )
        elif "warm_up" in request:
            end = time.perf_counter() + request["seconds"]
            for i in range(request["warm_up"]):
                self.step(1000 + i)
                if time.perf_counter() > end:
                    break
        elif "step" in request:
            return asdict(self.step(request["step"]))
        elif "save" in request:
            torch.save(output_and_gradient(self.side, self.tokens(0)).cpu(), request["save"])
        return {}

    def step(self, i: int) -> "Seconds":
        return time_step(self.side, self.tokens(i))

    def tokens(self, i: int) -> Tensor:
        return make_tokens(self.shape, i, self.dtype, self.device)


# ---------------------------------------------------------------------------- the work


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


# ---------------------------------------------------------------------------- the sides


@dataclass
class Side:
    """One way to compute the layer: [T, D] -> [T, D], and what else takes a gradient."""

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]


def our_side(
    shape: Shape, weights: Weights, dtype: torch.dtype, experts_dtype: torch.dtype, device: str
) -> Side:
    """The only place that knows how our layer is built and called."""
    from titan_vlm.models.moe.layer import MoE
    from titan_vlm.models.moe.tokens import Moment, tokens_of

    with torch.device(device):
        layer = MoE(shape.width, shape.hidden, shape.experts, shape.top_k).to(dtype)
        index_T = tokens_of([shape.tokens], moment=Moment(observe=False))
    layer.experts.to(experts_dtype)
    with torch.no_grad():
        layer.router.weight.copy_(weights.router_ED)
        layer.experts.gate_up.copy_(torch.cat((weights.gate_EFD, weights.up_EFD), 1).mT)
        layer.experts.down.copy_(weights.down_EDF.mT)
    return Side(lambda x_TD: layer(x_TD, index_T), list(layer.parameters()))


def transformers_side(
    shape: Shape,
    weights: Weights,
    dtype: torch.dtype,
    experts_dtype: torch.dtype,
    device: str,
    kind: str,
) -> Side:
    from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as modeling

    config = modeling.Qwen3VLMoeTextConfig(
        hidden_size=shape.width,
        moe_intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation=kind,
    )
    with torch.device(device):
        block = modeling.Qwen3VLMoeTextSparseMoeBlock(config).to(dtype)
    block.experts.to(experts_dtype)
    with torch.no_grad():
        block.gate.weight.copy_(weights.router_ED)
        block.experts.gate_up_proj.copy_(torch.cat((weights.gate_EFD, weights.up_EFD), 1))
        block.experts.down_proj.copy_(weights.down_EDF)
    return Side(lambda x_TD: block(x_TD.unsqueeze(0)).squeeze(0), list(block.parameters()))


def titan_side(
    shape: Shape, weights: Weights, dtype: torch.dtype, experts_dtype: torch.dtype, device: str
) -> Side:
    """Its experts compute in bfloat16 whatever their weights are in."""
    from torchtitan.models.common import moe
    from torchtitan.models.common.linear import Linear

    experts, top_k = shape.experts, shape.top_k
    config = moe.MoE.Config(
        num_experts=experts,
        load_balance_coeff=None,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(
                dim=shape.width, hidden_dim=shape.hidden, num_experts=experts
            ),
            token_dispatcher=moe.LocalTokenDispatcher.Config(num_experts=experts, top_k=top_k),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=experts,
            gate=Linear.Config(in_features=shape.width, out_features=experts),
            top_k=top_k,
            score_func="softmax",
            route_norm=True,
        ),
    )
    with torch.device(device):
        layer = config.build().to(dtype)
    inner = layer.routed_experts.inner_experts
    with torch.no_grad():
        layer.router.gate.weight.copy_(weights.router_ED)
        inner.w1_EFD.copy_(weights.gate_EFD)
        inner.w3_EFD.copy_(weights.up_EFD)
        inner.w2_EDF.copy_(weights.down_EDF)

    def forward(x_TD: Tensor) -> Tensor:
        return layer(x_TD.unsqueeze(0)).squeeze(0)

    return Side(forward, list(layer.parameters()))


def dense_side(
    shape: Shape, weights: Weights, dtype: torch.dtype, experts_dtype: torch.dtype, device: str
) -> Side:
    """Weights of its own: it is not to compute the same, but as much."""
    from titan_vlm.models.layers.mlp import SwiGLU

    with torch.device(device):
        mlp = SwiGLU(shape.width, shape.top_k * shape.hidden).to(experts_dtype)
    return Side(mlp, list(mlp.parameters()))


SIDES: dict[str, Callable[..., Side]] = {
    "ours": our_side,
    "eager": partial(transformers_side, kind="eager"),
    "grouped_mm": partial(transformers_side, kind="grouped_mm"),
    "torchtitan": titan_side,
    "dense": dense_side,
}


# ---------------------------------------------------------------------------- measuring


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


if __name__ == "__main__":
    main()
