"""scripts/check_hf_parity.py as a user runs it: what it prints and how it exits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import convert
from scripts.hf_reference import new_reference, tiny_config

ROOT = Path(__file__).resolve().parents[2]


def run(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/check_hf_parity.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_quick_holds_and_ends_with_its_figures():
    done = run("--quick")
    figures = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and figures["holds"]
    assert max(figures["max_logits"], figures["max_loss"]) < 1e-10
    assert figures["max_gradient"] < 1e-9
    assert "vision gradients: model.visual." in done.stdout


@pytest.mark.slow
def test_a_checkpoint_that_transformers_misreads_does_not_pass(tmp_path):
    config = tiny_config(moe=True, moe_intermediate_size=32)  # 2F = D
    new_reference(config).save_pretrained(tmp_path / "a")
    Image.fromarray(np.full((50, 31, 3), 99, np.uint8)).save(tmp_path / "odd.png")
    images = ("--image", tmp_path / "odd.png", tmp_path / "odd.png", "--dtype", "float32")
    assert run(tmp_path / "a", *images).returncode == 0

    assert convert.main([*map(str, (tmp_path / "a", tmp_path / "b")), "--layout=published"]) == 0
    done = run(tmp_path / "b", *images)
    assert done.returncode == 1
    assert "note: these expert tensors are in the published layout" in done.stdout
    assert "DIFFER" in done.stdout and not json.loads(done.stdout.splitlines()[-1])["holds"]


def test_what_cannot_be_checked_exits_with_two(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and "config.json" in done.stderr.splitlines()[-1]
    new_reference(tiny_config(moe=False)).save_pretrained(tmp_path)
    done = run(tmp_path, "--image", tmp_path / "none.jpg")
    assert done.returncode == 2 and "none.jpg" in done.stderr.splitlines()[-1]
    assert run().returncode == 2
