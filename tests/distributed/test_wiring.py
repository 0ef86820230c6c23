"""That a setting reaches the model: what parity cannot see, for it is the same either way."""

import pytest
import torch

from tests.small_run import Silent, small_config
from titan_vlm import train
from titan_vlm.models.layers import attention
from titan_vlm.models.moe.exchange import AllGatherDispatcher, AllToAllDispatcher
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.qwen3_vl import text


@pytest.mark.parametrize(
    ("dispatcher", "expected"),
    [("all_to_all", AllToAllDispatcher), ("allgather", AllGatherDispatcher)],
)
def test_the_dispatcher_is_the_one_of_the_config(world, tmp_path, dispatcher, expected):
    changes = {"parallelism__ep": "2", "parallelism__dispatcher": dispatcher}
    assert world.run(2, dispatchers, tmp_path, changes) == [{expected.__name__}] * 2


def dispatchers(output, changes):
    run = train.prepare(small_config(output, **changes))
    return {type(m.dispatcher).__name__ for m in run.model.modules() if isinstance(m, MoE)}


@pytest.mark.parametrize(("sequence_parallel", "length"), [("true", 48), ("false", 96)])
def test_sequence_parallel_norms_see_their_part_of_the_positions(
    world, tmp_path, sequence_parallel, length
):
    changes = {"parallelism__tp": "2", "parallelism__sequence_parallel": sequence_parallel}
    assert world.run(2, positions_of_a_norm, tmp_path, changes) == [length] * 2


def positions_of_a_norm(output, changes):
    run = train.prepare(small_config(output, **changes))
    seen = []
    norm = run.model.text.layers["1"].attn_norm
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    train.train_step(run, Silent())
    return seen[0]


def test_every_block_is_compiled_and_recomputed(world, tmp_path):
    changes = {"compile__enable": "true", "compile__backend": "aot_eager"}
    changes |= {"activation_checkpoint__mode": "full"}
    layers, graphs, attended = world.run(1, compiled_and_recomputed, tmp_path, changes)[0]
    assert graphs >= 2  # of a vision block and of a text block
    assert attended == 2 * layers  # in the forward pass, and again in the backward pass


def compiled_and_recomputed(output, changes):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    attended = []

    @torch.compiler.disable
    def attend(*args, **kwargs):
        attended.append(1)
        return attention.attend(*args, **kwargs)

    text.attend = attend
    try:
        run = train.prepare(small_config(output, training__global_batch_size="1", **changes))
        train.train_step(run, Silent())
    finally:
        text.attend = attention.attend
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return run.parts.dims.text.num_layers, graphs, len(attended)
