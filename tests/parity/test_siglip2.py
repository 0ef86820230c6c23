"""The vision tower equals transformers' SigLIP2, NaFlex and fixed: every scale and gradient.

transformers saves random weights, `VisionPart` reads them. The reference runs padded pictures, ours
runs them packed. transformers resamples NaFlex's positions in float32 on a CPU whatever the model's
type; the test lifts that cast, so that float64 compares float64.
"""

import pytest
import torch
from torch import Tensor
from transformers import (
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from titan_vlm.errors import ConfigError
from titan_vlm.models.inputs import Batch
from titan_vlm.models.omni.config import FINAL, POOLED, VisionConfig
from titan_vlm.models.omni.parts import VisionPart
from titan_vlm.models.omni.vision import VisionTower, in_merge_order

TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-12, 1e-10)}
DIMS = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
DIMS |= {"num_attention_heads": 4, "patch_size": 4}
GRIDS = [(8, 8), (6, 10), (2, 4), (6, 10), (12, 2)]


def ours_of(reference, directory, dtype, **changes):
    config = VisionConfig(
        depth=3,
        hidden_size=48,
        intermediate_size=80,
        num_heads=4,
        patch_size=4,
        num_positions=36,
        **changes,
    )
    reference.save_pretrained(directory)
    tower = VisionTower(config).to(dtype)
    shapes = {f"vision.{name}": tuple(p.shape) for name, p in tower.named_parameters()}
    part = VisionPart(directory, config, shapes)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            parameter.copy_(part[f"vision.{name}"])
    return tower


def randomized(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model


def batch_of(pictures: list[Tensor], grids, merge) -> Batch:
    """`pictures`: [h, w, colour, y, x] of patches."""
    patches = [in_merge_order(x.flatten(2), merge) for x in pictures]
    none = torch.zeros(1, 0, dtype=torch.int64)
    return Batch(
        none,
        none,
        none.expand(3, 1, 0),
        none.bool(),
        [],
        torch.cat(patches) if patches else torch.zeros(0, 48),
        [(1, h, w) for h, w in grids],
        none[0],
    )


def pictures_of(grids, dtype):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(h, w, 3, 4, 4, generator=generator, dtype=dtype) for h, w in grids]


def lift_the_cast(monkeypatch):
    whole = torch.Tensor.to

    def keep(self, *args, **kwargs):
        asked = args[:1] == (torch.float32,) and self.dtype == torch.float64
        return self if asked else whole(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep)


def error(a: Tensor, b: Tensor, floor: float = 1e-9) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=floor)).item()


def scrambled(scales: list[Tensor]) -> Tensor:
    """A number that depends on every element differently."""
    return sum((x * torch.linspace(-1, 1, x.numel()).view_as(x).to(x)).sum() for x in scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("merge", [1, 2])
def test_naflex_equals_transformers(dtype, merge, tmp_path, monkeypatch):
    hf = Siglip2VisionConfig(**DIMS, num_patches=36)
    reference = randomized(Siglip2VisionModel(hf)).to(dtype)
    ours = ours_of(reference, tmp_path, dtype, merge_size=merge)
    pictures = pictures_of(GRIDS, dtype)
    longest = max(h * w for h, w in GRIDS)
    values = torch.zeros(len(GRIDS), longest, 48, dtype=dtype)
    mask = torch.zeros(len(GRIDS), longest, dtype=torch.int64)
    for i, picture in enumerate(pictures):
        patches = picture.permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)
        values[i, : len(patches)], mask[i, : len(patches)] = patches, 1
    lift_the_cast(monkeypatch)
    out = reference(values, mask, torch.tensor(GRIDS), output_hidden_states=True)
    monkeypatch.undo()

    def packed(x):
        rows = [
            in_merge_order(x[i, : h * w].unflatten(0, (h, w)), merge)
            for i, (h, w) in enumerate(GRIDS)
        ]
        return torch.cat(rows)

    expected = {str(i): packed(out.hidden_states[i + 1]) for i in range(3)}
    expected |= {FINAL: packed(out.last_hidden_state), POOLED: out.pooler_output}
    scales = ours(batch_of(pictures, GRIDS, merge))
    check_gradients(ours, reference, scales, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", [6, 8])
def test_fixed_resolutions_equal_transformers_at_their_own_size_and_at_others(
    dtype, side, tmp_path
):
    hf = SiglipVisionConfig(**DIMS, image_size=24)
    reference = randomized(SiglipVisionModel(hf)).to(dtype)
    ours = ours_of(reference, tmp_path, dtype, naflex=False, merge_size=1)
    grids = [(side, side)] * 3
    pictures = pictures_of(grids, dtype)
    pixels = torch.stack(
        [x.permute(2, 0, 3, 1, 4).reshape(3, side * 4, side * 4) for x in pictures]
    )
    out = reference(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    expected = {str(i): out.hidden_states[i + 1].flatten(0, 1) for i in range(3)}
    expected |= {FINAL: out.last_hidden_state.flatten(0, 1), POOLED: out.pooler_output}
    scales = ours(batch_of(pictures, grids, 1))
    check_gradients(ours, reference, scales, expected, dtype)


def check_gradients(ours, reference, scales, expected, dtype):
    outputs, gradients = TOLERANCE[dtype]
    assert scales.keys() == expected.keys()
    for name, value in expected.items():
        assert error(scales[name], value) < outputs, name
    scrambled([scales[name] for name in expected]).backward()
    scrambled(list(expected.values())).backward()
    theirs = {
        name.removeprefix("vision_model."): p.grad for name, p in reference.named_parameters()
    }
    shapes = {f"vision.{name}": tuple(p.shape) for name, p in ours.named_parameters()}
    part = object.__new__(VisionPart)  # the same way for gradients as for weights
    part.config, part.shapes = ours.config, shapes
    from titan_vlm.models.omni.parts import _place

    part.places = {name: _place(name, shape, ours.config) for name, shape in shapes.items()}

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

        def read(self, rows):
            return self.tensor if rows is None else self.tensor[rows]

    part.infos = {name: Held(grad) for name, grad in theirs.items()}
    floor = max(grad.abs().max().item() for grad in theirs.values()) / 100  # of keys' biases: 0
    for name, parameter in ours.named_parameters():
        assert error(parameter.grad, part[f"vision.{name}"], floor) < gradients, name
    assert {place.name for place in part.places.values()} == theirs.keys()


def test_without_pictures_every_parameter_still_takes_part():
    tower = VisionTower(VisionConfig(2, 48, 80, 4, patch_size=4, num_positions=36))
    scales = tower(batch_of([], [], 2))
    assert {name: tuple(x.shape) for name, x in scales.items()} == {
        "0": (0, 48),
        "1": (0, 48),
        FINAL: (0, 48),
        POOLED: (0, 48),
    }
    sum(x.sum() for x in scales.values()).backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []


def test_a_tower_of_another_size_is_refused_by_the_name_of_a_tensor(tmp_path):
    hf = Siglip2VisionConfig(**DIMS, num_patches=36)
    Siglip2VisionModel(hf).save_pretrained(tmp_path)
    config = VisionConfig(3, 48, 96, 4, patch_size=4, num_positions=36)
    tower = VisionTower(config)
    shapes = {f"vision.{name}": tuple(p.shape) for name, p in tower.named_parameters()}
    with pytest.raises(ConfigError, match=r"layers.0.mlp.fc1.\w+ is \[80.* there and \[96"):
        VisionPart(tmp_path, config, shapes)
