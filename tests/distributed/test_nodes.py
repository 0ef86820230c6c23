"""Two torchrun agents as two nodes, started by the SLURM script with stand-ins for its commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.gloo_world import free_port
from tests.small_run import curve, run, words

ROOT = Path(__file__).parents[2]
EXACT = {"training__dtype": "float64", "training__steps": "3", "checkpoint__export_hf": "false"}
# Every node runs what srun is given; its own options begin with two dashes and hold a =.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --*=* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""
SCONTROL = """#!/usr/bin/env bash
[[ $* == "show hostnames node[0-1]" ]] && printf 'localhost\\nother\\n'
"""


@pytest.mark.slow
def test_two_nodes_under_slurm_train_what_one_process_trains(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "17",
        "RDZV_PORT": str(free_port()),
        "NGPU": "1",
        "OMP_NUM_THREADS": "1",
        "TITAN_NO_VENV": "1",
        "TITAN_PYTHON": sys.executable,
    }
    settings = words(tmp_path / "two", EXACT | {"parallelism__ep": "2"})
    subprocess.run(
        ["bash", ROOT / "scripts" / "train.slurm", "--config", "qwen_vlm_moe.toml", *settings],
        env=os.environ | slurm,
        check=True,
        timeout=240,
    )
    assert run(tmp_path / "one", **EXACT) == 0
    for ours, theirs in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
