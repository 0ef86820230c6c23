"""TorchTitan's MoE layer for `bench_moe.py`, in a process and an environment of its own.

Reads a request per line from stdin, a JSON object, and answers with one on stdout:

    {"build": shape, "dtype": "float32", "device": "cpu", "steps": 9, "threads": 2} -> {}
    {"step": i}           -> {"forward": seconds, "backward": seconds} for tokens i
    {"save": path}        -> {}; output and input gradient for tokens 0 lie there

A request that fails is answered with {"error": what}.
"""

import json
import sys
import warnings
from dataclasses import asdict

import torch
from moe_work import Shape, Side, make_tokens, make_weights, output_and_gradient, time_step
from torch import Tensor


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_flush_denormal(True)
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print
    side, tokens = None, []
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        try:
            if "build" in request:
                torch.set_num_threads(request["threads"])
                shape, device = Shape(**request["build"]), request["device"]
                dtype = getattr(torch, request["dtype"])
                side = None  # the last one's memory
                side = make_side(shape, dtype, device)
                tokens = [make_tokens(shape, i, dtype, device) for i in range(request["steps"])]
            elif "step" in request:
                answer = asdict(time_step(side, tokens[request["step"]]))
            elif "save" in request:
                torch.save(output_and_gradient(side, tokens[0]).cpu(), request["save"])
        except Exception as error:  # whatever it is, the benchmark goes on without this peer
            answer = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
        print(json.dumps(answer), file=answers, flush=True)


def make_side(shape: Shape, dtype: torch.dtype, device: str) -> Side:
    """The router in float32 where its autocast has that (not on CPU); experts always in bf16."""
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
    weights = make_weights(shape, device)
    inner = layer.routed_experts.inner_experts
    with torch.no_grad():
        layer.router.gate.weight.copy_(weights.router_ED)
        inner.w1_EFD.copy_(weights.gate_EFD)
        inner.w3_EFD.copy_(weights.up_EFD)
        inner.w2_EDF.copy_(weights.down_EDF)

    def forward(x_TD: Tensor) -> Tensor:
        return layer(x_TD.unsqueeze(0)).squeeze(0)

    return Side(forward, list(layer.parameters()))


if __name__ == "__main__":
    main()
