"""The models that the trainer knows: one line each."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import MoE
from titan_vlm.models.omni import config as omni
from titan_vlm.models.omni import hf as omni_hf
from titan_vlm.models.omni import parts as omni_parts
from titan_vlm.models.omni import plan as omni_plan
from titan_vlm.models.omni.flops import flops as omni_flops
from titan_vlm.models.omni.model import Omni
from titan_vlm.models.projector import Projector
from titan_vlm.models.qwen3_vl import config as qwen3_vl
from titan_vlm.models.qwen3_vl import experts as qwen3_vl_experts
from titan_vlm.models.qwen3_vl import hf as qwen3_vl_hf
from titan_vlm.models.qwen3_vl import upcycle as qwen3_vl_upcycle
from titan_vlm.models.qwen3_vl.flops import flops as qwen3_vl_flops
from titan_vlm.models.qwen3_vl.model import Qwen3VL
from titan_vlm.models.qwen3_vl.plan import divisible as qwen3_vl_divisible
from titan_vlm.models.qwen3_vl.plan import pipeline_units as qwen3_vl_pipeline_units
from titan_vlm.models.units import Unit


@dataclass(frozen=True)
class ModelSpec:
    """What the trainer asks of a model family. `Any` is the family's own configuration."""

    flavors: dict[str, Any]
    # directory -> the dimensions its config.json states
    read_hf_config: Callable[[str], Any]
    with_token_ids: Callable[[Any, Any, int], Any]
    # (dimensions, [moe], [projector]) -> dimensions with experts and projector as they say
    with_settings: Callable[[Any, MoE, Projector], Any]
    # dimensions -> what `data.images.VisualSpec` must know of the model
    visual: Callable[[Any], dict[str, Any]]
    build: Callable[[Any], nn.Module]
    flops: Callable[[Any, list[int], list[tuple[int, int, int]]], float]
    # dimensions -> for each view of the mesh, what it splits and the number that must divide
    divisible: Callable[[Any], dict[str, dict[str, int]]]
    # (dimensions, tokens of a row) -> what a pipeline may be cut between, with what each costs
    pipeline_units: Callable[[Any, int], list[Unit]]
    # (model, directory, seed): fill the model from a Hugging Face directory; what is upcycled
    # draws by the seed
    load_hf: Callable[..., None]
    # (state, config, directory, ...): write one; `qwen3_vl/hf.py` names the options
    save_hf: Callable[..., None]
    # dimensions -> ConfigError, where Hugging Face's format cannot hold such a model
    check_exportable: Callable[[Any], None]
    # Of a family that can be assembled: (vision_path, text_path) -> the dimensions of both
    read_parts_config: Callable[[str, str], Any] | None = None
    # and (model, vision_path, text_path, seed): fill the model from them
    load_parts: Callable[..., None] | None = None


MODELS = {
    "qwen3_vl": ModelSpec(
        flavors=qwen3_vl.FLAVORS,
        read_hf_config=qwen3_vl_hf.read_config,
        with_token_ids=qwen3_vl.with_token_ids,
        with_settings=qwen3_vl_experts.with_settings,
        visual=qwen3_vl.visual,
        build=Qwen3VL,
        flops=qwen3_vl_flops,
        divisible=qwen3_vl_divisible,
        pipeline_units=qwen3_vl_pipeline_units,
        load_hf=qwen3_vl_upcycle.load_hf,
        save_hf=qwen3_vl_hf.save_hf,
        check_exportable=qwen3_vl_hf.check_exportable,
    ),
    "omni": ModelSpec(
        flavors=omni.FLAVORS,
        read_hf_config=omni_hf.read_config,
        with_token_ids=qwen3_vl.with_token_ids,
        with_settings=omni.with_settings,
        visual=omni.visual,
        build=Omni,
        flops=omni_flops,
        divisible=omni_plan.divisible,
        pipeline_units=omni_plan.pipeline_units,
        load_hf=omni_hf.load_hf,
        save_hf=omni_hf.save_hf,
        check_exportable=omni_hf.check_exportable,
        read_parts_config=omni_parts.read_parts_config,
        load_parts=omni_parts.load_parts,
    ),
}


def model_spec(name: str) -> ModelSpec:
    """The family called `name` (`model.name`).

    Raises:
        ConfigError: there is none; names the nearest.
    """
    return _lookup(MODELS, name, "model.name")


def model_config(
    name: str, flavor: str, hf_path: str = "", vision_path: str = "", text_path: str = ""
) -> Any:
    """The dimensions of a flavour; with flavour "hf" of a Hugging Face directory, with "parts" of
    those of a vision tower and a decoder.

    Raises:
        ConfigError: unknown name or flavour, or no readable `config.json` in a directory.
    """
    spec = model_spec(name)
    from_parts = {"parts": None} if spec.read_parts_config else {}
    named = _lookup(spec.flavors | {"hf": None} | from_parts, flavor, "model.flavor")
    if flavor == "parts":
        return spec.read_parts_config(vision_path, text_path)
    if flavor != "hf":
        return named
    try:
        return spec.read_hf_config(hf_path)
    except ConfigError as error:
        raise ConfigError(f"model.hf_path = {error}") from error


def _lookup(table: dict[str, Any], name: str, setting: str) -> Any:
    if name not in table:
        nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"{setting} = {name!r}: expected one of {', '.join(table)}; the nearest is {nearest!r}"
        )
    return table[name]
