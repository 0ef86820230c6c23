"""The configurations that are shipped for OmniMoE: planned for the worlds that they name."""

from math import prod

import pytest

from titan_vlm.config import load_config
from titan_vlm.stages import make_stages

WORLDS = {"omni_8gpu.toml": 8, "omni_64gpu_rack.toml": 64, "omni_64gpu_nodes.toml": 64}


@pytest.mark.parametrize("name", WORLDS)
def test_every_stage_is_planned_for_its_world(name):
    stages = make_stages(load_config(name), WORLDS[name])
    assert [stage.name for stage in stages] == ["align", "all", "tune"]
    for stage in stages:
        assert prod(stage.plan.degrees.values()) == WORLDS[name]
    degrees = stages[0].plan.degrees
    if "rack" in name:
        axes = ("pp", "dp_shard", "ep", "tp")
        assert [degrees[axis] for axis in axes] == [2, 2, 8, 2]
    else:
        assert degrees["ep"] * degrees["tp"] == 8  # inside a node
    phases = [stage.config for stage in stages]
    assert [phase.training.freeze for phase in phases] == [["vision"], [], []]
    assert [phase.data.max_pixels for phase in phases] == [224**2, 448**2, 896**2]
    assert [phase.moe.text.top_k for phase in phases] == [8, 16, 16]
    assert [phase.moe.text.aux_loss for phase in phases] == [0.01, 0.002, 0.001]
    dims = stages[0].parts.dims
    assert dims.text.num_experts == 64
    assert [i for i in range(36) if dims.text.is_moe_layer(i)] == list(range(18, 36))


@pytest.mark.parametrize("name", WORLDS)
def test_on_another_world_they_are_refused_with_the_sum(name):
    with pytest.raises(ValueError, match="parallelism"):
        make_stages(load_config(name), 6)
