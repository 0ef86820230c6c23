"""A rank that does not arrive at a collective: the run ends on every rank and names it."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from scripts.gloo_world import free_port
from tests.small_run import run, words

ROOT = Path(__file__).parents[2]
HANGING = ROOT / "tests" / "distributed" / "hanging.py"
TIMEOUT_S = 5
ENDS_S = 90  # start-up of the processes included


@pytest.mark.slow
def test_a_hang_in_the_expert_group_ends_every_rank_and_names_the_one_that_is_late(tmp_path):
    """Rank 2 waits in the all-to-all of experts for rank 3, ranks 0 and 1 wait for both elsewhere.

    Without torchrun, which would end them: each must end by itself, rank 3 from its sleep.
    """
    settings = hanging(tmp_path, "experts", 3, training__global_batch_size="4", parallelism__ep="2")
    shared = {"WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, HANGING, *settings],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        said = [process.communicate(timeout=ENDS_S)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1] * 4

    errors = {line for text in said for line in text.splitlines() if line.startswith("error:")}
    assert len(errors) == 1 and "Traceback" not in "".join(said)
    (error,) = errors
    assert error.startswith(
        "error: rank 3 did not arrive within comm.timeout_s = 5 s; rank 3 is at"
    )
    assert "at step 2 in titan_vlm/models/moe/" in error
    assert "rank 2 waited in gloo:all_to_all of mesh_ep" in error

    recorded = tmp_path / "run" / "flight_recorder"
    assert str(recorded) in error
    assert "in sleep" in (recorded / "stacks_rank_3.txt").read_text()
    assert "Timed out waiting" in (recorded / "stacks_rank_2.txt").read_text()
    assert len(list(recorded.iterdir())) == 8
    late = pickle.loads((recorded / "gloo_rank_3").read_bytes())["entries"]
    assert all(entry["retired"] for entry in late)
    analysed = subprocess.run(
        [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", recorded]
        + ["--prefix", "gloo_rank_"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "missing ranks: {3}" in analysed.stdout + analysed.stderr


def test_a_rank_stuck_in_its_data_is_named_in_one_line_also_where_it_is_the_one_shown(tmp_path):
    settings = hanging(tmp_path, "data", 0, training__global_batch_size="2")
    ended = subprocess.run(
        [sys.executable, "-P", ROOT / "scripts" / "launch.py", "--standalone"]
        + ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", "--local-ranks-filter", "0"]
        + [HANGING, *settings],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=ENDS_S,
    )
    assert ended.returncode == 1
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in ended.stderr
    assert (
        "rank 0 did not arrive" in errors[0]
        and "at step 2 in titan_vlm/training/guards.py" in errors[0]
    )
    assert "rank 1 waited in gloo:all_reduce" in errors[0]


def hanging(tmp_path, where, rank, **changes):
    """The arguments of hanging.py."""
    (tmp_path / "meet").mkdir()
    changes |= {"comm__timeout_s": str(TIMEOUT_S), "training__steps": "3"}
    return [where, str(rank), str(tmp_path / "meet"), "--config", "qwen_vlm_moe.toml"] + words(
        tmp_path / "run", changes
    )


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def test_a_run_that_ends_leaves_no_thread_and_no_dump(world, tmp_path):
    for status, threads in world.run(2, run_and_count, tmp_path):
        assert status == 0
        assert "hang" not in threads
    assert not (tmp_path / "flight_recorder").exists()


def run_and_count(output):
    status = run(output, training__steps="2", checkpoint__export_hf="false")
    return status, [thread.name for thread in threading.enumerate()]


def test_the_timeout_reaches_every_process_group(world, tmp_path):
    """Those of the mesh's axes, those flattened later, and that of checkpoints."""
    for timeouts in world.run(4, timeouts_s, tmp_path):
        assert len(timeouts) == 6
        assert set(timeouts.values()) == {77}


def timeouts_s(output):
    import torch.distributed as dist

    from titan_vlm import distributed
    from titan_vlm.config import Checkpoint, Comm
    from titan_vlm.mesh import AXES, build_mesh
    from titan_vlm.training.checkpoint import Checkpointer

    device = distributed.start("cpu", Comm(timeout_s=77))
    mesh = build_mesh(device.type, dict.fromkeys(AXES, 1) | {"ep": 2, "tp": 2}, False)
    assert mesh.batch.size() == 2
    Checkpointer(output, Checkpoint())
    dist.barrier()  # whoever leaves first would close the connections that others are still making
    return {
        f"{group.group_desc} {group.group_name}": group._get_backend(
            torch.device("cpu")
        ).options._timeout.total_seconds()
        for group in dist.distributed_c10d._world.pg_map
    }
