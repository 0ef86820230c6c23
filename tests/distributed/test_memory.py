"""What a rank holds falls with the number of ranks, and it never holds more."""

import json
from dataclasses import replace
from resource import RUSAGE_SELF, getrusage

import pytest
from torch.distributed.tensor import DTensor

from scripts.gloo_world import World
from tests.small_run import Silent, small_config
from titan_vlm import stages, train
from titan_vlm.models.qwen3_vl.config import FLAVORS, Qwen3VLConfig, to_hf

STEP = {"training__global_batch_size": "4", "schedule__warmup_steps": "0"}


@pytest.fixture(scope="module")
def single(world, tmp_path_factory):
    return world.run(1, bytes_after_a_step, tmp_path_factory.mktemp("one"), STEP)[0]


@pytest.mark.parametrize(
    ("ranks", "axes"),
    [
        (2, {"dp_shard": "2"}),
        (4, {"dp_shard": "4"}),
        (2, {"ep": "2"}),
        (4, {"dp_shard": "2", "ep": "2"}),
    ],
)
def test_parameters_gradients_and_optimizer_state_fall_as_one_over_n(
    world, tmp_path, single, ranks, axes
):
    changes = STEP | {f"parallelism__{axis}": degree for axis, degree in axes.items()}
    for held in world.run(ranks, bytes_after_a_step, tmp_path, changes):
        assert held.keys() == single.keys()
        for kind, size in held.items():
            assert size == pytest.approx(single[kind] / ranks, rel=0.1), kind


@pytest.mark.slow
def test_the_peak_of_starting_up_is_that_of_a_part(tmp_path):
    """Measured by the kernel, in processes of their own: a rank never holds the whole model."""
    text = replace(FLAVORS["debug_moe"].text, hidden_size=512, num_experts=64, vocab_size=8192)
    text = replace(text, moe_intermediate_size=512)
    vision = replace(FLAVORS["debug_moe"].vision, out_hidden_size=512)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(Qwen3VLConfig(text, vision))))
    changes = {"model__flavor": "hf", "model__hf_path": str(tmp_path)}
    world = World()
    try:
        for whole, grown in world.run(2, peak_of_preparing, tmp_path / "run", changes):
            assert whole > 600e6
            assert grown < 0.5 * whole + 120e6  # libraries are loaded meanwhile
    finally:
        world.close()


def peak_of_preparing(output, changes):
    """Bytes of the whole model, and by how much the peak of resident memory grew."""
    config = small_config(output, training__global_batch_size="2", **changes)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    run = train.prepare(config)
    grown = (getrusage(RUSAGE_SELF).ru_maxrss - before) * 1024  # KiB
    return sum(p.numel() * p.element_size() for p in run.model.parameters()), grown


def bytes_after_a_step(output, changes):
    """This rank's bytes of each kind; the model has none before it is sharded."""
    config = small_config(output, **changes)
    parallelize = stages.parallelize

    def without_memory(whole, *args):
        assert all(parameter.is_meta for parameter in whole.parameters())
        model, pipeline = parallelize(whole, *args)
        assert all(local(parameter).is_meta for parameter in model.parameters())
        return model, pipeline

    stages.parallelize = without_memory
    try:
        run = train.prepare(config)
    finally:
        stages.parallelize = parallelize
    held = {}

    def weigh(*_):
        held["gradients"] = size(p.grad for p in run.model.parameters())

    run.optimizer.register_step_pre_hook(weigh)
    train.train_step(run, Silent())
    held["parameters"] = size(run.model.parameters())
    states = run.optimizer.state.values()
    held["optimizer"] = size(x for state in states for x in state.values())
    return held


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def size(tensors):
    return sum(local(x).numel() * x.element_size() for x in tensors)
