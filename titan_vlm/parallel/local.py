"""Parameters that become DTensors, and modules whose arithmetic is this rank's own."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def shard_parameter(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replace a whole parameter by its part of a DTensor; no communication."""
    whole = getattr(module, name)
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, [placement])
    part = whole.data[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].clone()
    sharded = DTensor.from_local(part, mesh, [placement], shape=whole.shape, stride=whole.stride())
    module.register_parameter(name, nn.Parameter(sharded, requires_grad=whole.requires_grad))


def compute_locally(module: nn.Module, gradient: Sequence[Placement]) -> None:
    """Let `module.forward` see its own DTensor parameters as this rank's plain parts.

    Args:
        gradient: placements of the parameters' gradients: as the parameters lie where a rank's
            tokens give the whole gradient of its part, `Partial()` where it is a sum over ranks.
    """
    forward = module.forward

    def run(*args, **kwargs):
        parts: dict[str, Tensor] = {
            name: parameter.to_local(grad_placements=gradient)
            for name, parameter in module.named_parameters(recurse=False)
            if isinstance(parameter, DTensor)
        }
        # An attribute of the instance goes before a parameter of the same name.
        module.__dict__.update(parts)
        try:
            return forward(*args, **kwargs)
        finally:
            for name in parts:
                del module.__dict__[name]

    module.forward = run


Places = list[tuple[nn.Module, str]]


def tied_parameters(model: nn.Module) -> list[Places]:
    """The places of each parameter that stands in several, before something replaces them."""
    places: dict[nn.Parameter, Places] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def tie(tied: list[Places]) -> None:
    """Let all places have the parameter of the first again."""
    for (first, name), *others in tied:
        for module, other in others:
            module.register_parameter(other, getattr(first, name))
