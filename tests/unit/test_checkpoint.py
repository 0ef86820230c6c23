"""Checkpoints: restored runs are the same to the last bit, and no reader sees half of one."""

import random
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.fsdp import fully_shard

from tests.toy_run import Model, Run, assert_same_bits
from titan_vlm.errors import CheckpointError, ConfigError


@pytest.fixture(params=["no group", "gloo"])
def world(request, tmp_path):
    if request.param == "no group":
        yield
        return
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("async_save", [False, True])
def test_a_restored_run_is_bitwise_the_uninterrupted_one(tmp_path, world, async_save):
    run = Run(tmp_path / "c", async_save=async_save)
    run.train(5)
    run.save(5, {"step": 5, "loader": {"shards": [1, 2]}})
    run.train(5)
    run.checkpointer.wait()

    resumed = Run(tmp_path / "c", seed=99)
    assert resumed.checkpointer.history.latest() == 5
    assert resumed.load(5) == [{"step": 5, "loader": {"shards": [1, 2]}}]
    resumed.train(5)
    assert_same_bits(resumed, run)


@contextmanager
def writing_held_back(monkeypatch):
    """DCP's files are not written before this block ends."""
    go, original = threading.Event(), FileSystemWriter.write_data

    def write_data(self, *args):
        assert go.wait(60)
        return original(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_data)
    try:
        yield
    finally:
        go.set()


def test_training_that_goes_on_during_an_async_save_does_not_leak_into_it(tmp_path, monkeypatch):
    run, reference = Run(tmp_path / "c", async_save=True), Run(tmp_path / "unused")
    for one in (run, reference):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        one.train(2)
    with writing_held_back(monkeypatch):
        run.save(2)
        run.train(3)
        assert run.checkpointer.history.latest() is None
        assert {path.name for path in (tmp_path / "c").glob("*")} <= {"step-000002.tmp"}
    run.checkpointer.wait()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-000002"]
    resumed = Run(tmp_path / "c")
    resumed.load(2)
    assert_same_bits(resumed, reference)


def test_two_async_saves_never_overlap(tmp_path, monkeypatch):
    active, most, original = [], [], FileSystemWriter.write_data

    def write_data(self, *args):
        active.append(1)
        most.append(len(active))
        threading.Event().wait(0.1)
        active.pop()
        return original(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_data)
    run = Run(tmp_path, async_save=True, keep_latest_k=0)
    for step in (1, 2, 3):
        run.train(1)
        run.save(step)
    run.checkpointer.wait()
    assert most == [1, 1, 1]
    assert run.checkpointer.history.steps() == [1, 2, 3]


def test_a_failed_async_save_is_reported_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    def write_data(self, *args):
        raise OSError("disk full")

    monkeypatch.setattr(FileSystemWriter, "write_data", write_data)
    run = Run(tmp_path, async_save=True)
    run.save(1)
    with pytest.raises(CheckpointError, match="1 saves in a row failed .* disk full"):
        run.checkpointer.wait()
    assert run.checkpointer.history.latest() is None


def test_only_the_latest_k_are_kept_and_leftovers_are_no_checkpoint(tmp_path):
    (tmp_path / "step-000003.tmp").mkdir()
    (tmp_path / "step-000003.tmp" / "torn").touch()
    run = Run(tmp_path, keep_latest_k=2)
    assert run.checkpointer.history.latest() is None
    for step in (1, 2, 3, 1000000):
        run.save(step)
    assert run.checkpointer.history.steps() == [3, 1000000]
    assert not (tmp_path / "step-000003" / "torn").exists()


def test_the_final_save_does_nothing_where_the_step_is_saved_already(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.save(4)
    monkeypatch.setattr("titan_vlm.training.checkpoint.dcp.save", None)
    run.save(4)


def test_learning_rate_and_groups_come_from_the_new_configuration(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run.save(2)
    resumed = Run(tmp_path)
    groups = [{"params": [parameter]} for parameter in reversed(list(resumed.model.parameters()))]
    resumed.optimizer = torch.optim.AdamW(groups, lr=0.5, fused=True)
    resumed.load(2)
    assert_same_bits(resumed, run)
    assert {group["lr"] for group in resumed.optimizer.param_groups} == {0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "a", nn.Linear(5, 6)), r"a.weight is \[6, 4\] there and \[6, 5\]"),
        (lambda m: setattr(m, "c", nn.Linear(1, 1)), r"model.c.weight is not in it"),
        (lambda m: delattr(m, "b"), r"model.b.weight is only there"),
        (lambda m: m.double(), r"is torch.float32 there and torch.float64 here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path, change, message):
    run = Run(tmp_path)
    run.save(1)
    change(run.model)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), fused=True)
    with pytest.raises(ConfigError, match=message) as refused:
        run.load(1)
    assert "\n" not in str(refused.value)


def sharded_run(rank, directory):
    """On two ranks with FSDP2: 3 steps, an asynchronous save, 2 steps; restored the same."""
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    run, resumed = (Run(f"{directory}/c", seed=seed + rank, async_save=True) for seed in (0, 7))
    for one in (run, resumed):
        torch.manual_seed(0)
        one.model = fully_shard(Model())
        one.optimizer = torch.optim.AdamW(one.model.parameters(), lr=0.1, fused=True)
    torch.manual_seed(rank)
    run.train(3)
    run.save(3, {"rank": rank})
    run.train(2)
    run.checkpointer.wait()
    dist.barrier()  # the name is given by rank 0
    assert resumed.checkpointer.history.latest() == 3
    assert resumed.load(3) == [{"rank": 0}, {"rank": 1}]
    resumed.train(2)
    got, want = resumed.everything(), run.everything()
    assert got.keys() == want.keys()
    for name, value in want.items():
        local = [x.to_local() if hasattr(x, "to_local") else x for x in (got[name], value)]
        assert torch.equal(*local), name
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_save_their_shards_and_their_own_generators(tmp_path):
    torch.multiprocessing.spawn(sharded_run, (str(tmp_path),), nprocs=2)
    assert Run(tmp_path / "c").load(3) == [{"rank": 0}, {"rank": 1}]  # in one process
