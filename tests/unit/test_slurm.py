"""scripts/train.slurm with stand-ins for SLURM's commands and for torchrun."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each stand-in writes down what it was told; srun then does what the test says, in $DO.
STAND_INS = {
    "srun": """echo "srun $*" >>"$NOTES"
echo "NNODES=$NNODES MAX_RESTARTS=$MAX_RESTARTS $RDZV_ENDPOINT $RDZV_ID" >>"$NOTES"
trap 'echo "srun got USR1" >>"$NOTES"; code=75' USR1
trap 'echo "srun got TERM" >>"$NOTES"; code=75' TERM
code=
case $DO in
    wait) touch "$NOTES.ready"; while [ ! "$code" ]; do sleep 0.05; done; sleep 0.3; exit $code ;;
    tasks) shift; exec "$@" ;;
    *) exit "$DO" ;;
esac
""",
    "scontrol": """echo "scontrol $*" >>"$NOTES"
[ "$1" != show ] || printf 'node0\\nnode1\\n'
""",
    # What run_train.sh takes for Python: the config is fine, and torchrun takes notes.
    "python": """case " $* " in
    *launch.py*) echo "torchrun ${*#*launch.py}" >>"$NOTES"; exit 75 ;;
esac
case $1 in - | -c) exit 0 ;; esac
""",
}


@pytest.fixture
def job(tmp_path):
    """Starts the script as a job on two nodes; returns the process and what was noted so far."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    notes = tmp_path / "notes"

    def start(do, **env):
        slurm = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_ID": "17",
            "TITAN_NO_VENV": "1",
            "TITAN_PYTHON": str(tmp_path / "python"),
            "NOTES": str(notes),
            "DO": str(do),
        }
        read = ("MIN_NODES", "MAX_", "RDZV_", "NNODES", "NGPU", "MASTER_", "LOG_RANK")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(read)}
        process = subprocess.Popen(
            ["bash", ROOT / "scripts" / "train.slurm", "--config", "X"],
            env=clean | slurm | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if do == "wait":
            end = time.monotonic() + 60
            while not Path(f"{notes}.ready").exists():
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.02)
        return process, lambda: notes.read_text().splitlines()

    return start


REQUEUE = "scontrol requeue 17"


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_a_job_is_queued_again_only_when_it_was_stopped(job, status, requeued):
    process, notes = job(status)
    process.communicate(timeout=60)
    assert process.returncode == status
    assert (REQUEUE in notes()) == requeued


def test_the_signal_before_the_time_is_up_reaches_the_run_and_queues_the_job_again(job):
    process, notes = job("wait")
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "srun got USR1" in notes() and notes()[-1] == REQUEUE
    assert "queued again" in said


def test_a_cancelled_job_is_not_queued_again(job):
    process, notes = job("wait")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert notes()[-1] == "srun got TERM"


def test_a_job_is_not_queued_for_ever(job):
    process, notes = job(75, SLURM_RESTART_COUNT="4", MAX_REQUEUES="4")
    said, _ = process.communicate(timeout=60)
    assert REQUEUE not in notes() and "error: stopped before its last step" in said


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({}, "NNODES=2 MAX_RESTARTS=3 node0:29500 17-0"),
        (
            {"MIN_NODES": "1", "MAX_RESTARTS": "9", "SLURM_RESTART_COUNT": "2"},
            "NNODES=1:2 MAX_RESTARTS=9 node0:29500 17-2",
        ),
        ({"MIN_NODES": "2", "MAX_NODES": "4"}, "NNODES=2:4 MAX_RESTARTS=3 node0:29500 17-0"),
    ],
)
def test_the_run_may_do_with_fewer_nodes(job, env, told):
    process, notes = job(0, **env)
    process.communicate(timeout=60)
    assert notes()[:3] == [
        "scontrol show hostnames node[0-1]",
        "srun --kill-on-bad-exit=0 ./run_train.sh --config X",
        told,
    ]


def test_every_task_is_a_torchrun_that_can_start_again(job):
    process, notes = job("tasks", MIN_NODES="1", NGPU="8")
    said, _ = process.communicate(timeout=60)
    (line,) = [line for line in notes() if line.startswith("torchrun")]
    assert "--nnodes 1:2 --nproc-per-node 8 " in line
    assert "--rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id 17-0" in line
    assert line.endswith("--max-restarts 3 -m titan_vlm.train --config X")
    assert process.returncode == 75 and notes()[-1] == REQUEUE, said


def test_the_batch_script_asks_slurm_for_the_signal():
    lines = (ROOT / "scripts" / "train.slurm").read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@300", "--requeue", "--no-kill", "--open-mode=append"} <= set(asked)
