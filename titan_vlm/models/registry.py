"""The models that the trainer knows: one line each."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import MoE
from titan_vlm.models.qwen3_vl import config as qwen3_vl
from titan_vlm.models.qwen3_vl import hf as qwen3_vl_hf
from titan_vlm.models.qwen3_vl import upcycle as qwen3_vl_upcycle
from titan_vlm.models.qwen3_vl.experts import with_experts as qwen3_vl_with_experts
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
    # (dimensions, [moe]) -> dimensions with experts routed as it says
    with_experts: Callable[[Any, MoE], Any]
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


MODELS = {
    "qwen3_vl": ModelSpec(
        flavors=qwen3_vl.FLAVORS,
        read_hf_config=qwen3_vl_hf.read_config,
        with_token_ids=qwen3_vl.with_token_ids,
        with_experts=qwen3_vl_with_experts,
        build=Qwen3VL,
        flops=qwen3_vl_flops,
        divisible=qwen3_vl_divisible,
        pipeline_units=qwen3_vl_pipeline_units,
        load_hf=qwen3_vl_upcycle.load_hf,
        save_hf=qwen3_vl_hf.save_hf,
        check_exportable=qwen3_vl_hf.check_exportable,
    )
}


def model_spec(name: str) -> ModelSpec:
    """The family called `name` (`model.name`).

    Raises:
        ConfigError: there is none; names the nearest.
    """
    return _lookup(MODELS, name, "model.name")


def model_config(name: str, flavor: str, hf_path: str = "") -> Any:
    """The dimensions of a flavour, or with flavour "hf" of a Hugging Face directory.

    Raises:
        ConfigError: unknown name or flavour, or no readable `config.json` in `hf_path`.
    """
    spec = model_spec(name)
    named = _lookup(spec.flavors | {"hf": None}, flavor, "model.flavor")
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
