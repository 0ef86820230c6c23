"""Out of memory: which errors say so, and what is reported of them."""

import errno
import resource

import pytest
import torch

from tests.small_run import run, small_config
from titan_vlm import train
from titan_vlm.config import load_config
from titan_vlm.training import memory


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_say_that_there_is_no_memory(error, is_one):
    assert memory.is_out_of_memory(error) == is_one


def test_the_error_of_the_hosts_allocator_is_known():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.int8)
    assert memory.is_out_of_memory(refused.value)


@pytest.fixture
def state(tmp_path):
    state = train.prepare(small_config(tmp_path, training__dtype="float64"))
    yield state
    torch.distributed.destroy_process_group()


def test_what_is_held_is_counted_to_the_byte(state):
    from tests.small_run import Silent

    numbers = sum(p.numel() for p in state.model.parameters())
    assert memory.shares_held(state.model, state.optimizer) == {
        "parameters": 8 * numbers,
        "gradients": 0,
        "optimizer": 0,
    }
    train.train_step(state, Silent())
    held = memory.shares_held(state.model, state.optimizer)
    trained = [p for p in state.model.parameters() if p in state.optimizer.state]
    steps = 4 * len(trained)  # one float32 each
    assert held["optimizer"] == 16 * sum(p.numel() for p in trained) + steps
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    held = memory.shares_held(state.model, state.optimizer)
    assert held["gradients"] == 8 * sum(p.numel() for p in trained)


def test_memory_in_use_grows_with_what_is_allocated():
    before = memory.memory_used(torch.device("cpu"))
    block = torch.ones(2**27, dtype=torch.int8)
    assert memory.memory_used(torch.device("cpu")) - before == pytest.approx(len(block), rel=0.2)
    assert memory.memory_limit() >= before


def test_the_limit_is_the_least_of_all(monkeypatch):
    least = memory.memory_limit() // 2
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (least, resource.RLIM_INFINITY))
    assert memory.memory_limit() == least


def test_only_what_can_still_help_is_named():
    settings = ["--training.micro_batch_size=1", "--activation_checkpoint.mode=full"]
    settings += ["--training.loss_chunk_tokens=32", "--parallelism.cpu_offload=true"]
    keys = [key for key, *_ in memory.what_helps(load_config("qwen_vlm_moe.toml", settings))]
    assert keys == ["training.seq_len", "data.max_pixels", "parallelism.dp_shard, ep"]


def test_an_allocation_that_fails_ends_the_run_with_the_report(tmp_path, monkeypatch, capfd):
    def allocate(*_):
        torch.empty(2**60, dtype=torch.int8)

    monkeypatch.setattr(train, "forward_backward", allocate)
    assert run(tmp_path) == 1
    said = capfd.readouterr().err
    assert "error: rank 0 is out of memory at step 1: " in said
    assert "you tried to allocate" in said and "  held: parameters" in said
    assert "Traceback" not in said


def test_also_before_there_is_a_run(tmp_path, monkeypatch, capfd):
    def allocate(*_, **__):
        raise MemoryError

    monkeypatch.setattr(train, "fill", allocate)
    assert run(tmp_path) == 1
    said = capfd.readouterr().err
    assert "error: rank 0 is out of memory while setting up: MemoryError" in said
    assert "held" not in said and "training.seq_len = 96" in said
