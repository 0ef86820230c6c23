"""Small models of Qwen3-VL, and what is written of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from titan_vlm.data.images import VisualSpec
from titan_vlm.data.processor_config import image_processor_config, video_processor_config
from titan_vlm.data.tokenizer import load_tokenizer
from titan_vlm.errors import ConfigError
from titan_vlm.models.init import init_weights
from titan_vlm.models.qwen3_vl.hf import (
    load_hf,
    save_hf,
)
from titan_vlm.models.qwen3_vl.model import Qwen3VL
from titan_vlm.models.safetensors_io import SINGLE

EXPERTS = "model.language_model.layers.0.mlp.experts"
# D = 64: no square expert tensor, gate_up square, down square
NO_SQUARE, GATE_UP_SQUARE, DOWN_SQUARE = 24, 32, 64


def build(config, seed=0, dtype=torch.float32):
    model = Qwen3VL(config).to(dtype)
    init_weights(model, seed, 0.1)
    return model


def saver(folder: Path) -> Callable[..., Path]:
    """What saves a model in `folder` under a name and returns the directory."""
    tokenizer, spec = load_tokenizer(), VisualSpec(65536, 1 << 24, 65536, 1 << 24)
    processors = {
        "preprocessor_config.json": image_processor_config(spec),
        "video_preprocessor_config.json": video_processor_config(spec),
    }

    def call(model, name="saved", dtype=torch.float32, **options):
        save_hf(
            model.state_dict() if isinstance(model, Qwen3VL) else model,
            options.pop("config", None) or model.config,
            folder / name,
            tokenizer=tokenizer,
            processor_configs=processors,
            dtype=dtype,
            **options,
        )
        return folder / name

    return call


def tensors(directory):
    """Everything in the files, whatever their number."""
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def rewrite(directory, change):
    """Save a single-file directory again after `change(tensors)`."""
    content = tensors(directory)
    change(content)
    save_file(content, directory / SINGLE, {"format": "pt"})


def assert_same(a: Mapping, b: Mapping):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def refusal(directory, config):
    """The error of loading, after which the model is as it was."""
    model = build(config, seed=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_hf(model, directory)
    assert_same(model.state_dict(), before)
    assert "\n" not in str(caught.value)
    return str(caught.value)
