"""What a rank holds falls with the number of ranks, and it never holds more."""

import pytest
from torch.distributed.tensor import DTensor

from tests.small_run import Silent, small_config
from titan_vlm import train

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


def bytes_after_a_step(output, changes):
    """This rank's bytes of each kind; the model has none before it is sharded."""
    config = small_config(output, **changes)
    parallelize = train.parallelize

    def without_memory(whole, *args):
        assert all(parameter.is_meta for parameter in whole.parameters())
        model, pipeline = parallelize(whole, *args)
        assert all(local(parameter).is_meta for parameter in model.parameters())
        return model, pipeline

    train.parallelize = without_memory
    try:
        run = train.prepare(config)
    finally:
        train.parallelize = parallelize
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
