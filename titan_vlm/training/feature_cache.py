"""What a frozen vision tower makes of each picture, kept on disk (`data.feature_cache`).

    weights and settings of the tower --+
    patches of a picture, its grid -----+--> hash --> DIRECTORY/3f/a09c...: its scales

A picture that is there is not computed, in this run or in any other with the same tower. Ranks
whose tower is sharded compute together: where one of them has a picture that is not there, the
others run the tower on none. The features are those of the micro-batch in which a picture was first
seen; in another one they would differ by rounding.
"""

import hashlib
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from titan_vlm.config import Config
from titan_vlm.errors import ConfigError
from titan_vlm.mesh import Mesh, rank, size
from titan_vlm.models.inputs import Batch
from titan_vlm.models.layers.head import whole
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.placement import LogicalOrder

logger = logging.getLogger("titan_vlm")
DIGEST = 20  # bytes
# With these a picture's features would depend on the pictures beside it, on the step or on chance.
_PLAIN = ("router", "noise", "capacity_factor", "bias_update", "dropout")

Scales = dict[str, Tensor]


def check(model: nn.Module, config: Config) -> bool:
    """Whether a stage of a run could use the cache.

    Args:
        model: of the stage, on the meta device and frozen as it says.

    Raises:
        ConfigError: it has a frozen tower whose features cannot be kept; names the key.
    """
    key = f'data.feature_cache = "{config.data.feature_cache}"'
    if not hasattr(model.vision, "rows"):
        raise ConfigError(
            f'{key}: the vision tower of "{config.model.name}" is one with its projector, and '
            'nothing of it can be kept; leave it out, or use model.name = "omni"'
        )
    if not is_frozen(model.vision):
        return False
    vision, plain = model.vision.config.moe, MoEConfig()
    for name in _PLAIN if model.vision.config.moe_layers else ():
        if getattr(vision, name) != getattr(plain, name):
            raise ConfigError(
                f"{key}: expected moe.vision.{name} = {getattr(plain, name)}, with which the "
                f"features of a picture are its own, got {getattr(vision, name)}"
            )
    return True


def is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def apply(model: nn.Module, config: Config, mesh: Mesh) -> None:
    """Let the vision tower of `model`, which has its weights, use the cache where it is frozen. All
    ranks that have a part of it call this together."""
    tower = getattr(model, "vision", None)
    if not config.data.feature_cache or tower is None or isinstance(tower.forward, FeatureCache):
        return
    if not is_frozen(tower):
        logger.info("data.feature_cache: not used while the vision tower trains")
        return
    tower.forward = FeatureCache(tower, model.projector.all_scales, config, mesh)


def fingerprint(tower: nn.Module, about: str, device: str) -> bytes:
    """Of its weights and settings, whatever ranks share them.

    Args:
        device: where ranks talk; parameters may live in host memory.
    """
    digest = hashlib.blake2b(f"{tower.config} {about}".encode(), digest_size=DIGEST)
    state = dict([*tower.named_parameters(), *tower.named_buffers()])
    weights = LogicalOrder({name: x.detach().to(device) for name, x in state.items()})
    for name, _ in tower.named_parameters():
        digest.update(name.encode())
        digest.update(_bytes(whole(weights[name]).cpu()))
    return digest.digest()


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.contiguous().view(-1).view(torch.uint8).numpy())


class FeatureCache:
    """Takes the place of the forward pass of `tower`, for the scales called `names`."""

    def __init__(self, tower: nn.Module, names: list[str], config: Config, mesh: Mesh):
        self.directory, self.names = Path(config.data.feature_cache), names
        self.dtype = getattr(torch, config.training.dtype)
        about = f"{self.dtype} {config.quantize} {names}"
        self.stamp = fingerprint(tower, about, mesh.root.device_type)
        self.compute: Callable[[Batch], Scales] = tower.forward
        self.rows, self.width, self.mesh = tower.rows, tower.config.hidden_size, mesh
        self.warned = False

    def __call__(self, batch: Batch) -> Scales:
        """As the tower: each scale of the pictures of `batch`, in their order."""
        host = batch.on_host
        pixels = host.pixels_NC.split([t * h * w for t, h, w in host.grids])
        keys = [self.key(*picture) for picture in zip(host.grids, pixels, strict=True)]
        found = [self.read(key) for key in keys]
        missing = torch.tensor([scales is None for scales in found], dtype=torch.int32)
        # Ranks along tp have the same pictures, and a file may appear between their looks.
        missing = _max(missing.to(batch.pixels_NC.device), self.mesh.tp)
        any_missing = _max(missing.sum().view(1), self.mesh.tokens)
        if any_missing.item():
            here = missing.nonzero().flatten().tolist()
            with torch.no_grad():
                made = self.compute(_pictures(batch, here))
            for i, scales in zip(here, self.each(made, [host.grids[i] for i in here]), strict=True):
                found[i] = scales
                if rank(self.mesh.tp) == 0:
                    self.write(keys[i], scales)
        return {name: self.join([scales[name] for scales in found], batch) for name in self.names}

    def join(self, parts: list[Tensor], batch: Batch) -> Tensor:
        device = batch.pixels_NC.device
        if not parts:
            return torch.empty(0, self.width, dtype=self.dtype, device=device)
        return torch.cat([part.to(device, non_blocking=True) for part in parts])

    def each(self, scales: Scales, grids: list[tuple[int, int, int]]) -> list[Scales]:
        """The scales of each picture."""
        parts = {
            name: scales[name].split([self.rows(name, grid) for grid in grids])
            for name in self.names
        }
        return [{name: parts[name][i] for name in self.names} for i in range(len(grids))]

    # ------------------------------------------------------------------------ files

    def key(self, grid: tuple[int, int, int], pixels_NC: Tensor) -> str:
        """The name of a picture's file."""
        digest = hashlib.blake2b(self.stamp, digest_size=DIGEST)
        digest.update(repr(grid).encode())
        digest.update(_bytes(pixels_NC))
        name = digest.hexdigest()
        return f"{name[:2]}/{name[2:]}"

    def read(self, key: str) -> Scales | None:
        """What is there of a picture; None if nothing is, or a damaged file, which the next `write`
        replaces."""
        try:
            content = (self.directory / key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.warn("cannot be read", error)
            return None
        if content[:DIGEST] != _digest(content[DIGEST:]):
            return None
        return load(content[DIGEST:])

    def write(self, key: str, scales: Scales) -> None:
        """Keep a picture's scales: the whole file appears at once. Where the disk fails, the run
        goes on without."""
        content = save({name: x.cpu().contiguous() for name, x in scales.items()})
        path = self.directory / key
        beside = path.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(_digest(content) + content)
            beside.replace(path)
        except OSError as error:
            self.warn("cannot be written", error)
            with suppress(OSError):
                beside.unlink()

    def warn(self, what: str, error: OSError) -> None:
        if not self.warned:
            logger.warning(
                "data.feature_cache = %s %s (%s); what is not there is computed",
                *(self.directory, what, error.strerror),
            )
        self.warned = True


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def _max(flags: Tensor, view: DeviceMesh | None) -> Tensor:
    """Over the ranks of a view."""
    if size(view) > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=view.get_group())
    return flags


def _pictures(batch: Batch, chosen: list[int]) -> Batch:
    """`batch` with some of its pictures."""
    lens = [t * h * w for t, h, w in batch.grids]
    pixels = batch.pixels_NC.split(lens)
    return replace(
        batch,
        pixels_NC=torch.cat([batch.pixels_NC[:0], *(pixels[i] for i in chosen)]),
        grids=[batch.grids[i] for i in chosen],
        image_keys=batch.image_keys and [batch.image_keys[i] for i in chosen],
    )
