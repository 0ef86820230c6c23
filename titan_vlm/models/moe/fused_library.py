"""The libraries behind `fused_exchange.py` and `hybrid_exchange.py`: options, import, limits.

A library is found and asked whether it can do the work when a model is built, so that a run fails
before its first step and in words that name what would work.
"""

import importlib
from dataclasses import dataclass, fields
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import FusedOptions
from titan_vlm.models.moe.layout import ALIGN


@dataclass(frozen=True)
class Library:
    """What is behind a dispatcher: class `buffer` of `module`, and how to speak of it."""

    module: str
    buffer: str
    title: str
    hardware: str
    num_sms: int
    options: tuple[str, ...]  # of those that not all have


_DEEPEP_HARDWARE = "NVIDIA Hopper or Blackwell GPUs, NVLink within and RDMA between nodes"
LIBRARIES = {
    "deepep": Library("deep_ep", "Buffer", "DeepEP", _DEEPEP_HARDWARE, 20, ("async_dispatch",)),
    "uccl_ep": Library(
        "uccl.ep.buffer",
        "Buffer",
        "UCCL-EP",
        "NVIDIA or AMD GPUs, NVLink or its like within and any RDMA network between nodes",
        20,
        ("async_dispatch",),
    ),
    "hybridep": Library(
        "deep_ep",
        "HybridEPBuffer",
        "DeepEP's branch hybrid-ep",
        "NVIDIA Hopper or Blackwell GPUs, NVLink domains up to NVL72 and RDMA between them",
        24,
        ("permute_fusion", "pad_multiple"),
    ),
}


def load(name: str) -> type:
    """The buffer class of the library behind dispatcher `name`.

    Raises:
        ConfigError: it is not installed, too old, or this machine has no GPU for it.
    """
    library = LIBRARIES[name]
    try:
        buffer_class = getattr(importlib.import_module(library.module), library.buffer)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f'dispatcher = "{name}" needs the package {library.module.split(".")[0]} '
            f"({library.title}, for {library.hardware}): {error}; "
            f'dispatcher = "all_to_all" works everywhere'
        ) from error
    if not torch.cuda.is_available():
        raise ConfigError(
            f'dispatcher = "{name}" is for {library.hardware}, and no GPU is visible; '
            f'dispatcher = "all_to_all" works everywhere'
        )
    return buffer_class


def choose_num_sms(name: str, options: FusedOptions) -> int:
    """The multiprocessors to use; refuses options that dispatcher `name` would not read.

    Raises:
        ConfigError: such an option is set, or a number is out of range.
    """
    library = LIBRARIES[name]
    for field in fields(FusedOptions):
        shared = field.name in ("num_sms", "share_buffer")
        value = getattr(options, field.name)
        if (
            not shared
            and field.name not in library.options
            and value != getattr(FusedOptions(), field.name)
        ):
            owners = [other for other, its in LIBRARIES.items() if field.name in its.options]
            raise ConfigError(
                f'{field.name} = {value}: dispatcher = "{name}" has no such choice; it is one of '
                f"{' and '.join(owners)}"
            )
    in_halves = name != "hybridep"
    if options.num_sms < 0 or (in_halves and options.num_sms % 2):
        raise ConfigError(
            f"num_sms = {options.num_sms}: expected a positive"
            f"{' even number, half of them send and half receive' if in_halves else ' number'}; "
            f"0: the default, {library.num_sms}"
        )
    if options.pad_multiple < 1 or options.pad_multiple % ALIGN:
        raise ConfigError(
            f"pad_multiple = {options.pad_multiple}: expected a multiple of {ALIGN}, to which all "
            f"experts' rows are filled up"
        )
    return options.num_sms or library.num_sms


# From the host and device assertions of the sources named in the two dispatchers: rows of whole
# 16-byte vectors, in pairs; warps that copy 32 vectors at once between nodes; one lane per pair of
# a token; 16 KiB of shared memory per row and warp.
NODE = 8
MAX_PAIRS = 32
MAX_WIDTH = 8192


def check_model(name: str, width: int, ranks: int, max_pairs: int) -> None:
    """Whether dispatcher `name` can carry tokens of `width` numbers, in `max_pairs` pairs each.

    Raises:
        ConfigError: it cannot; says why and what can.
    """
    hybrid = name == "hybridep"
    multiple = 256 if ranks > NODE and not hybrid else 16
    if width % multiple or (width >= MAX_WIDTH and not hybrid):
        limit = "" if hybrid else f" below {MAX_WIDTH}"
        problem = f"takes hidden sizes that are multiples of {multiple}{limit}, not {width}"
    elif max_pairs > MAX_PAIRS and not hybrid:
        problem = f"takes at most {MAX_PAIRS} experts per token, the router may choose {max_pairs}"
    else:
        return
    raise ConfigError(
        f'dispatcher = "{name}" {problem} (with {ranks} ranks); dispatcher = "all_to_all" takes it'
    )


def check_tensor(name: str, x_TD: Tensor) -> None:
    """Whether dispatcher `name` can carry these tokens.

    Raises:
        ConfigError: they are not on a GPU, or not bfloat16.
    """
    if x_TD.device.type == "cuda" and x_TD.dtype == torch.bfloat16:
        return
    found = f"{str(x_TD.dtype).removeprefix('torch.')} on {x_TD.device.type}"
    raise ConfigError(
        f'dispatcher = "{name}" carries bfloat16 on CUDA, not {found}; '
        f'dispatcher = "all_to_all" carries everything'
    )


# Connections that several layers use, as long as one of them does.
_SHARED: WeakValueDictionary = WeakValueDictionary()


def connect(share: bool, connection_class: type, *args):
    """`connection_class(*args)`: with `share` the one that was made of the same arguments."""
    if not share:
        return connection_class(*args)
    key = (connection_class, *args)
    connection = _SHARED.get(key)
    if connection is None:
        connection = _SHARED[key] = connection_class(*args)
    return connection
