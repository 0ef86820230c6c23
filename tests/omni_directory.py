"""A small OmniMoE and the Hugging Face directory of it."""

from pathlib import Path

import torch

from titan_vlm.assembly import assemble, export
from titan_vlm.config import load_config
from titan_vlm.models.init import init_weights

EXPERTS = {"experts": "4", "top_k": "2", "expert_width": "24"}
BIASED = EXPERTS | {"score": "sigmoid", "bias_update": "sign", "aux_loss": "0"}


def settings(**branches) -> dict[str, str]:
    named = {"model__name": "omni", "model__flavor": "debug", "projector__levels": "1:0,pooled:1"}
    named["moe__text__aux_loss"] = "0"
    for branch, moe in branches.items():
        named |= {f"moe__{branch}__{key}": str(value) for key, value in moe.items()}
    return named


def parts_of(**branches):
    words = []
    for key, value in settings(**branches).items():
        words += [f"--{key.replace('__', '.')}", value]
    return assemble(load_config("qwen_vlm_moe.toml", words))


def write_export(directory: Path):
    """(directory, parts, model) of an export with experts in all branches."""
    parts = parts_of(text=BIASED, vision=EXPERTS | {"layers": "1,3"}, projector=EXPERTS)
    model = parts.spec.build(parts.dims)
    init_weights(model, 0, 0.1)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("bias_E"):
                buffer.copy_(torch.linspace(-0.3, 1 / 3, len(buffer), dtype=torch.float64))
    export(parts, model.state_dict(), directory, "bfloat16")
    return directory, parts, model
