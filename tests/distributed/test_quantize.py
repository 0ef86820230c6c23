"""Quantised experts behind sharding and exchange: every rank multiplies so, its own experts."""

import pytest

from tests.small_run import Silent, small_config
from titan_vlm import train
from titan_vlm.models.moe.quantize import emulated
from titan_vlm.parallel import quantize

CHANGES = {"training__dtype": "bfloat16", "quantize__emulate": "true"}


@pytest.mark.parametrize("name", ["float8", "mxfp8"])
@pytest.mark.parametrize("mesh", ["ep", "dp_shard", "pp"])
def test_a_step_is_that_of_one_process(world, tmp_path, name, mesh):
    changes = CHANGES | {"quantize__experts": name}
    (want,) = world.run(1, step, tmp_path / "one", changes)
    axes = {f"parallelism__{mesh}": "2"}
    if mesh == "pp":
        axes["parallelism__pp_split"] = "text.layers.2"  # experts on both sides
    ranks = world.run(2, step, tmp_path / "two", changes | axes)
    experts = 8 // (2 if mesh == "ep" else 1)
    for rank in ranks:
        assert set(rank["weights"]) == {(experts, 128, 320), (experts, 160, 128)}
    # Two products in each of three layers, for each row of the batch.
    assert sum(len(rank["weights"]) for rank in ranks) == len(want["weights"])
    assert want["weights"] == [(8, 128, 320), (8, 160, 128)] * 6
    loss = sum(rank["loss"] for rank in ranks)
    assert abs(loss - want["loss"]) / want["loss"] < 1e-3  # bfloat16
    for rank in ranks:
        for parameter, gradient in rank["gradients"].items():
            error = (gradient - want["gradients"][parameter]).norm()
            # Rows meet other rows in the scales of the weight's gradient.
            assert error / want["gradients"][parameter].norm() < 0.05, parameter


def step(output, changes):
    """Forward and backward of the first step: its loss, the experts' gradients, the products."""
    weights = []

    def counted(name):
        product = emulated(name)

        def count(x_RK, weight_EKN, layout):
            weights.append(tuple(weight_EKN.shape))
            return product(x_RK, weight_EKN, layout)

        return count

    quantize.emulated = counted
    losses, gradients = [], {}
    forward_backward = train.forward_backward

    def watched(run, batches, targets):
        loss = forward_backward(run, batches, targets)
        losses.append(float(loss))  # now: it is summed over the ranks in place
        for name, parameter in run.model.named_parameters():
            if "experts" in name:
                gradients[name] = parameter.grad.full_tensor().clone()  # clipping is in place
        return loss

    train.forward_backward = watched
    try:
        run = train.prepare(small_config(output, **changes))
        train.train_step(run, Silent())
    finally:
        quantize.emulated, train.forward_backward = emulated, forward_backward
    return {"loss": losses[0], "gradients": gradients, "weights": weights}
