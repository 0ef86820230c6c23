"""That a setting reaches the model: what parity cannot see, for it is the same either way."""

import importlib.util

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from tests.small_run import Silent, small_config
from titan_vlm import train
from titan_vlm.errors import ConfigError
from titan_vlm.models.layers import attention
from titan_vlm.models.moe.exchange import AllGatherDispatcher, AllToAllDispatcher
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.qwen3_vl import text


@pytest.mark.parametrize(
    ("dispatcher", "expected"),
    [("all_to_all", AllToAllDispatcher), ("allgather", AllGatherDispatcher)],
)
def test_the_dispatcher_is_the_one_of_the_config(world, tmp_path, dispatcher, expected):
    changes = {"parallelism__ep": "2", "moe__text__dispatcher": dispatcher}
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


def test_the_next_block_is_gathered_while_one_runs(world, tmp_path):
    for events in world.run(2, gathers_and_blocks, tmp_path, {}):
        at = {event: events.index(event) for event in dict.fromkeys(events)}
        assert at["gather text.layers.2"] < at["forward text.layers.1"]
        assert at["gather text.layers.2.moe.experts"] < at["forward text.layers.1"]
        assert at["gather text.layers.3"] > at["forward text.layers.0"]  # one ahead, not all
        back = events[at["forward text.layers.3"] :]
        assert back.index("gather text.layers.1") < back.index("backward text.layers.2")


@pytest.mark.parametrize(("wish", "times"), [("auto", 2), ("always", 2), ("never", 1)])
def test_a_block_is_gathered_again_for_the_backward_pass_or_kept(world, tmp_path, wish, times):
    changes = {"parallelism__reshard_after_forward": wish, "training__global_batch_size": "2"}
    for events in world.run(2, gathers_and_blocks, tmp_path, changes):
        assert events.count("gather text.layers.1") == times


def gathers_and_blocks(output, changes):
    """What happens in a step: which units are gathered, which blocks are done."""
    run = train.prepare(small_config(output, **changes))
    names = {module: name for name, module in run.model.named_modules()}
    events = []
    unshard = FSDPParamGroup.unshard

    def log(group, async_op=False):
        if group.is_sharded and group._all_gather_result is None:  # not under way either
            events.append(f"gather {names[group.modules[0]]}")
        return unshard(group, async_op)

    for name, block in run.model.blocks():
        block.register_forward_hook(lambda *_, name=name: events.append(f"forward {name}"))
        block.register_full_backward_hook(lambda *_, name=name: events.append(f"backward {name}"))
    FSDPParamGroup.unshard = log
    try:
        train.train_step(run, Silent())
    finally:
        FSDPParamGroup.unshard = unshard
    return events


@pytest.mark.parametrize(
    ("dispatcher", "words"),
    [
        ("local", "parallelism.ep"),
        ("deepep", "package deep_ep"),
        ("hybridep", "package deep_ep"),
        ("uccl_ep", "package uccl"),
    ],
)
def test_a_dispatcher_that_cannot_run_here_is_refused_by_name(world, tmp_path, dispatcher, words):
    changes = {"parallelism__ep": "2", "moe__text__dispatcher": dispatcher}
    if dispatcher != "local" and importlib.util.find_spec(words.split()[-1]):
        pytest.skip(f"{words} is installed")
    for said in world.run(2, refusal, tmp_path, changes):
        assert dispatcher in said and words in said and "all_to_all" in said
        assert "\n" not in said


def refusal(output, changes):
    try:
        train.prepare(small_config(output, **changes))
    except ConfigError as error:
        return str(error)
    return ""
