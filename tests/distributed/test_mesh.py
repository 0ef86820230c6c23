"""Degrees that work, and degrees that are refused with the nearest that do."""

import pytest

from titan_vlm import distributed
from titan_vlm.config import Parallelism
from titan_vlm.errors import ConfigError
from titan_vlm.mesh import AXES, build_mesh, check_divides, resolve_degrees


def degrees(**given):
    return dict.fromkeys(AXES, 1) | given


def test_dp_shard_takes_what_remains():
    assert resolve_degrees(Parallelism(ep=2, tp=2), 16) == degrees(dp_shard=4, ep=2, tp=2)
    assert resolve_degrees(Parallelism(dp_replicate=2, dp_shard=4), 8) == degrees(
        dp_replicate=2, dp_shard=4
    )


@pytest.mark.parametrize(
    ("given", "world", "said"),
    [
        (Parallelism(ep=3), 8, r"dp_replicate 1 x ep 3 x tp 1 = 3, .*divide the 8 .*use ep = [24]"),
        (Parallelism(dp_shard=4), 8, r"= 4, .*make the 8 processes.*dp_replicate = 2"),
        (Parallelism(tp=16), 8, r"= 16, .*divide the 8 .*tp = 8"),
        (Parallelism(dp_shard=0), 8, r"dp_shard = 8"),
    ],
)
def test_degrees_that_do_not_multiply_to_the_world_are_refused(given, world, said):
    with pytest.raises(ConfigError, match=said):
        resolve_degrees(given, world)


def test_what_a_degree_does_not_divide_is_refused_with_the_nearest():
    needs = {"tp": {"attention heads": 12, "key/value heads": 4}, "expert": {"experts": 8}}
    check_divides({"tp": 4, "expert": 8}, needs)
    with pytest.raises(ConfigError, match="12 attention heads over tp = 8 .*use 4"):
        check_divides({"tp": 8, "expert": 1}, needs)
    with pytest.raises(ConfigError, match="8 experts over ep .* = 6 is 1.33 each; .*4 or 8"):
        check_divides({"tp": 1, "expert": 6}, needs)


def test_views_connect_the_ranks_of_the_drawing(world):
    """The eight ranks of the module docstring, as rank 5 sees them."""
    views = world.run(8, views_of, degrees(dp_shard=2, ep=2, tp=2), False)
    assert views[5] == {
        "batch": [1, 3, 5, 7],
        "tokens": [0, 1, 2, 3, 4, 5, 6, 7],
        "tp": [4, 5],
        "expert": [5, 7],
        "fsdp": [1, 3, 5, 7],
        "efsdp": [0, 1, 4, 5],
    }
    over_tp = world.run(8, views_of, degrees(dp_shard=2, ep=2, tp=2), True)
    assert over_tp[5]["expert"] == [4, 5, 6, 7]
    assert over_tp[5]["efsdp"] == [1, 5]


def test_an_unused_axis_is_in_no_mesh(world):
    views = world.run(2, views_of, degrees(ep=2), False)
    assert views[1]["tp"] is None
    assert views[1]["expert"] == views[1]["batch"] == [0, 1]
    assert views[1]["efsdp"] == [1]


def test_groups_that_cross_nodes_are_named(world):
    crossing = world.run(8, across_nodes, degrees(ep=4, tp=2))
    assert crossing[3] == {4: ["expert [1, 3, 5, 7]"], 8: []}
    assert world.run(4, across_nodes, degrees(pp=2, tp=2))[0] == {4: [], 8: []}


def across_nodes(degrees):
    mesh = build_mesh(distributed.start("cpu").type, degrees, False)
    return {per_node: mesh.across_nodes(per_node) for per_node in (4, 8)}


def views_of(degrees, over_tp):
    mesh = build_mesh(distributed.start("cpu").type, degrees, over_tp)
    names = ("batch", "tokens", "tp", "expert", "fsdp", "efsdp")
    found = {name: getattr(mesh, name) for name in names}
    return {name: view and view.mesh.tolist() for name, view in found.items()}
