"""What a configuration names, made concrete: tokenizer, dimensions, pictures, the model and its
weights; and their export."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titan_vlm.config import Config
from titan_vlm.data.images import VisualSpec, visual_spec
from titan_vlm.data.processor_config import processor_configs
from titan_vlm.data.tokenizer import load_tokenizer, visual_token_ids
from titan_vlm.models.init import init_weights
from titan_vlm.models.moe.placement import LogicalOrder
from titan_vlm.models.registry import ModelSpec, model_config, model_spec
from titan_vlm.parallel.local import tie, tied_parameters

logger = logging.getLogger("titan_vlm")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}


@dataclass(frozen=True)
class Parts:
    """A model family, its dimensions with the tokenizer's ids, and how pictures become patches."""

    spec: ModelSpec
    dims: Any
    tokenizer: Any
    images: VisualSpec


def assemble(config: Config, tokenizer: Any = None) -> Parts:
    """Everything about a run's model that needs no weights.

    Args:
        tokenizer: where it is loaded already.

    Raises:
        ConfigError: model, tokenizer or dimensions that do not exist or do not fit.
    """
    spec = model_spec(config.model.name)
    dims = model_config(**asdict(config.model))
    dims = spec.with_settings(dims, config.moe, config.projector)
    dims = replace(
        dims, text=replace(dims.text, attention_dropout=config.training.attention_dropout)
    )
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)
    dims = spec.with_token_ids(dims, visual_token_ids(tokenizer), len(tokenizer))
    return Parts(spec, dims, tokenizer, visual_spec(config.data, **spec.visual(dims)))


def assemble_export(config: Config) -> Parts:
    """The same of what a run has exported: what was upcycled has experts now."""
    text, vision = (
        replace(branch, upcycle_shards=0, upcycle_noise=0.0)
        for branch in (config.moe.text, config.moe.vision)
    )
    return assemble(replace(config, moe=replace(config.moe, text=text, vision=vision)))


def export(
    parts: Parts, state: Mapping[str, Tensor], directory: Path, dtype: str, **options: Any
) -> None:
    """Write a Hugging Face directory; `options` are those of the family's `save_hf`."""
    parts.spec.save_hf(
        LogicalOrder(state),
        parts.dims,
        directory,
        tokenizer=parts.tokenizer,
        processor_configs=processor_configs(parts.images),
        dtype=getattr(torch, dtype),
        **options,
    )


def build_model(parts: Parts, config: Config) -> nn.Module:
    """The model on the meta device: it has no memory until it is sharded, so that no rank ever
    holds the whole."""
    with torch.device("meta"):
        model = parts.spec.build(parts.dims).to(DTYPES[config.training.dtype])
    logger.info(
        "%s %s: %.1f M parameters, %s",
        config.model.name,
        config.model.flavor,
        sum(p.numel() for p in model.parameters()) / 1e6,
        config.training.dtype,
    )
    return model


def fill(model: nn.Module, parts: Parts, config: Config, device: torch.device, fresh: bool) -> None:
    """Give this rank's part of the model memory, and its weights: from Hugging Face, from the seed,
    or (not `fresh`) from the checkpoint that is about to be loaded."""
    tied = tied_parameters(model)
    model.to_empty(device="cpu" if config.parallelism.cpu_offload else device)
    tie(tied)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.zeros_like(buffer, device=device)  # they are counters
    if fresh and config.checkpoint.initial_load_path:
        parts.spec.load_hf(model, config.checkpoint.initial_load_path, config.run.seed)
        logger.info("weights: from %s", config.checkpoint.initial_load_path)
    elif fresh and config.model.flavor == "parts":
        towers = (config.model.vision_path, config.model.text_path)
        parts.spec.load_parts(model, *towers, config.run.seed)
        logger.info("weights: from %s and %s, the rest random, seed %d", *towers, config.run.seed)
    elif fresh:
        logger.info("weights: random, seed %d", config.run.seed)
        init_weights(model, config.run.seed, parts.dims.text.initializer_range)
