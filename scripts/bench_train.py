"""A whole training step and the MoE layer, each beside its peer in one process.

1. Forward, backward and optimizer step of our Qwen3-VL-MoE against transformers' with
   `experts_implementation="grouped_mm"` and `"eager"`: the same weights, batch, dtype, optimizer,
   steps interleaved so that a noisy machine hits all alike. On CPU: 32 experts, top-4, model and
   expert width 256, 4 layers, 4 rows of 512 tokens with an image each, bf16. On CUDA: the layer
   dimensions of Qwen3-VL-30B-A3B, and its MFU.
2. The MoE layer against a dense SwiGLU of the same floating-point operations per token.

Figures are medians. The last line is one JSON object; a ratio above 1 of tokens per second means
that ours is faster, `ratio_moe_over_dense` is a ratio of times.
"""

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import transformers
from torch import nn

from titan_vlm.distributed import tune_cpu
from titan_vlm.models.init import init_weights
from titan_vlm.models.inputs import Batch
from titan_vlm.models.layers.mlp import SwiGLU
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.tokens import Moment, tokens_of
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig, to_hf
from titan_vlm.models.qwen3_vl.flops import flops
from titan_vlm.models.qwen3_vl.hf import load_hf
from titan_vlm.models.qwen3_vl.model import Qwen3VL
from titan_vlm.training.loss import chunked_cross_entropy
from titan_vlm.training.metrics import known_peak

ROWS, SEQ_LEN, SIDE = 4, 512, 16  # an image of SIDE x SIDE patches in each row
IMAGE, START, END = 8000, 8001, 8002
DTYPE = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each side")
    parser.add_argument(
        "--quick", action="store_true", help="few steps, and without the eager peer"
    )
    arguments = parser.parse_args()
    steps = 4 if arguments.quick else arguments.steps
    peers = ("grouped_mm",) if arguments.quick else ("grouped_mm", "eager")
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    tune_cpu()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(machine(device))

    config = model_config(device)
    figures = bench_step(config, device, steps, peers) | bench_layer(config.text, device, steps)
    print(json.dumps({"machine": machine(device), **figures}))


def machine(device: torch.device) -> str:
    """One line that names hardware and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def model_config(device: torch.device) -> Qwen3VLConfig:
    """What is measured: small on CPU, two layers of 30B-A3B on CUDA."""
    small = device.type == "cpu"
    text = TextConfig(
        vocab_size=8192 if small else 151936,
        hidden_size=256 if small else 2048,
        intermediate_size=768 if small else 6144,
        num_layers=4 if small else 2,
        num_heads=8 if small else 32,
        num_kv_heads=2 if small else 4,
        head_dim=32 if small else 128,
        mrope_section=(6, 5, 5) if small else (24, 20, 20),
        num_experts=32 if small else 128,
        num_experts_per_tok=4 if small else 8,
        moe_intermediate_size=256 if small else 768,
    )
    vision = VisionConfig(
        depth=4,
        hidden_size=256 if small else 1152,
        intermediate_size=768 if small else 4304,
        num_heads=8 if small else 16,
        out_hidden_size=text.hidden_size,
        num_positions=256 if small else 2304,
        deepstack_layers=(1, 2),
    )
    return Qwen3VLConfig(
        text,
        vision,
        image_token_id=IMAGE,
        video_token_id=END + 1,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def make_batch(config: Qwen3VLConfig) -> Batch:
    """Rows of one document each: transformers cannot pack several without cross-talk."""
    tokens_BS = torch.randint(0, IMAGE, (ROWS, SEQ_LEN))
    visual = slice(11, 11 + SIDE**2 // config.vision.merge_size**2)
    tokens_BS[:, visual.start - 1], tokens_BS[:, visual.stop] = START, END
    tokens_BS[:, visual] = IMAGE
    labels_BS = torch.full_like(tokens_BS, -100)
    labels_BS[:, :-1] = tokens_BS[:, 1:]
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        positions_3BS=torch.arange(SEQ_LEN).expand(3, ROWS, SEQ_LEN).contiguous(),
        valid_BS=torch.ones_like(tokens_BS, dtype=torch.bool),
        doc_lens=[SEQ_LEN] * ROWS,
        pixels_NC=torch.randn(ROWS * SIDE**2, config.vision.patch_dim),
        grids=[(1, SIDE, SIDE)] * ROWS,
        visual_index_M=(tokens_BS.flatten() == IMAGE).nonzero().squeeze(-1),
        num_samples=ROWS,
        num_images=ROWS,
    )


# ---------------------------------------------------------------------------- a training step


def bench_step(
    config: Qwen3VLConfig, device: torch.device, steps: int, kinds: tuple[str, ...]
) -> dict[str, float]:
    """Ours beside each peer in turn: three models at once are in each other's way."""
    batch = make_batch(config).to(device)
    tokens, figures, worst = ROWS * SEQ_LEN, {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            peer = make_peer(config, kind, device, folder)
            if not os.listdir(folder):
                peer.save_pretrained(folder)  # the weights that everyone starts from
            with device:
                model = Qwen3VL(config).to(DTYPE)
            load_hf(model, folder)
            losses = {
                "ours": partial(our_loss, model, batch),
                kind: partial(peer_loss, peer, batch),
            }
            worst = max(worst, check_same_work({n: loss().item() for n, loss in losses.items()}))
            models = {"ours": model, kind: peer}
            step = {name: training_step(models[name], loss) for name, loss in losses.items()}
            seconds = interleaved(step, steps, device)
            for name, taken in seconds.items():
                rate = f"{taken * 1e3:8.1f} ms  {tokens / taken:9,.0f} tokens/s"
                print(f"  training step {name:<12} {rate}")
            ratio = seconds[kind] / seconds["ours"]
            print(f"  ours / transformers ({kind}): {ratio:.2f}")
            figures[f"tokens_per_s_{kind}"] = tokens / seconds[kind]
            figures.setdefault("tokens_per_s_ours", tokens / seconds["ours"])
            figures["ratio_tokens_per_s" + ("_eager" if kind == "eager" else "")] = ratio
    figures["max_loss_difference"] = worst
    if peak := known_peak(device):
        work = flops(config, batch.doc_lens, batch.grids) / tokens
        figures["mfu"] = work * figures["tokens_per_s_ours"] / 1e12 / peak
        print(f"  MFU of ours: {figures['mfu']:.3f}")
    return figures


def check_same_work(losses: dict[str, float]) -> float:
    """The worst relative difference from ours.

    Raises:
        RuntimeError: the sides do not compute the same. At random weights any model's loss is
            near log V: two seeds differ by 3e-3, so that 1e-2 would accept weights that were
            never loaded.
    """
    worst = max(abs(value / losses["ours"] - 1) for value in losses.values())
    if worst > 1e-4:
        raise RuntimeError(f"the sides do not compute the same loss: {losses}")
    return worst


def make_peer(config: Qwen3VLConfig, kind: str, device: torch.device, folder: str) -> nn.Module:
    """transformers' model, its weights from `folder` where they are already there."""
    cls = transformers.Qwen3VLMoeForConditionalGeneration
    if os.listdir(folder):
        peer = cls.from_pretrained(folder, experts_implementation=kind, dtype=DTYPE)
    else:
        hf = transformers.Qwen3VLMoeConfig(**to_hf(config))
        peer = cls._from_config(hf, experts_implementation=kind, dtype=DTYPE)
    return peer.to(device).train()


def our_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    head = partial(chunked_cross_entropy, labels_BS=batch.labels_BS, chunk_tokens=512)
    return model(batch, head) / (ROWS * (SEQ_LEN - 1))


def peer_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(
        input_ids=batch.tokens_BS,
        labels=batch.tokens_BS,
        position_ids=batch.positions_3BS,
        pixel_values=batch.pixels_NC,
        image_grid_thw=torch.tensor(batch.grids, device=batch.tokens_BS.device),
        mm_token_type_ids=(batch.tokens_BS == IMAGE).int(),
    ).loss


def training_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---------------------------------------------------------------------------- the MoE layer


def bench_layer(text: TextConfig, device: torch.device, steps: int) -> dict[str, float]:
    tokens = ROWS * SEQ_LEN
    with device:
        moe = MoE(
            text.hidden_size, text.moe_intermediate_size, text.num_experts, text.num_experts_per_tok
        )
        dense = SwiGLU(text.hidden_size, text.num_experts_per_tok * text.moe_intermediate_size)
        index_T = tokens_of([tokens], moment=Moment(observe=False))
        x_TD = torch.randn(tokens, text.hidden_size, dtype=DTYPE, requires_grad=True)
    init_weights(moe, 0, 0.02)
    init_weights(dense, 0, 0.02)
    moe, dense = moe.to(DTYPE), dense.to(DTYPE)
    # Gradients start anew every time, as they do after an optimizer step.
    sides = {
        "moe": lambda: torch.autograd.grad(moe(x_TD, index_T).sum(), [x_TD, *moe.parameters()]),
        "dense": lambda: torch.autograd.grad(dense(x_TD).sum(), [x_TD, *dense.parameters()]),
    }
    seconds = interleaved(sides, 4 * steps, device)
    load = moe.router.load_E.max().item() / moe.router.load_E.double().mean().item()
    ratio = seconds["moe"] / seconds["dense"]
    print(
        f"  layer, {tokens} tokens: MoE {seconds['moe'] * 1e3:.1f} ms (busiest expert {load:.2f} x "
        f"the mean), dense SwiGLU of the same FLOPs {seconds['dense'] * 1e3:.1f} ms: {ratio:.2f}"
    )
    return {"ratio_moe_over_dense": ratio, "moe_ms": seconds["moe"] * 1e3, "load_max": load}


def interleaved(
    sides: dict[str, Callable[[], None]], steps: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each side, one step of each in turn, after three to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(steps + 3):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i >= 3:
                taken[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in taken.items()}


if __name__ == "__main__":
    main()
