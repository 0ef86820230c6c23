"""Stopping on several ranks: a signal to one, or to whoever started them, ends all after the same
step with everything saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.gloo_world import free_port
from tests.small_run import curve, run, words
from titan_vlm import events, launched, train

ROOT = Path(__file__).resolve().parents[2]
CHANGES = {
    "training__global_batch_size": "4",
    "training__steps": "5",
    "checkpoint__every": "0",
    "checkpoint__export_hf": "false",
    "parallelism__ep": "2",
}


def test_a_signal_to_one_rank_stops_all_after_the_same_step(world, tmp_path):
    done = world.run(4, run_signalled, tmp_path / "stopped", 3)
    assert done == [(75, 2)] * 4  # whoever was elsewhere finished the same step
    (folder,) = (tmp_path / "stopped" / "checkpoints").glob("step-*")
    assert folder.name == "step-000002"
    logs = sorted((tmp_path / "stopped" / "logs").iterdir())
    assert [log.name for log in logs] == [f"rank{rank}.log" for rank in range(4)]
    assert all("stopped after step 2 (SIGUSR1)" in log.read_text() for log in logs)

    assert world.run(4, run_here, tmp_path / "stopped") == [0] * 4
    assert world.run(4, run_here, tmp_path / "whole") == [0] * 4
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    told = [event["kind"] for event in events.read(tmp_path / "stopped")]
    assert told == ["start", "signal", "save", "stop", "start", "resume", "save", "stop"]


def run_here(output):
    os.environ.pop(launched.FOLDER, None)
    return run(output, **CHANGES)


def run_signalled(output, rank):
    """(status, steps done), where `rank` signals itself in its second step."""
    whole, steps = train.train_step, []

    def train_step(state, metrics):
        if state.step == 1 and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGUSR1)
        whole(state, metrics)
        steps.append(state.step)

    train.train_step = train_step
    try:
        return run_here(output), steps[-1]
    finally:
        train.train_step = whole


# ---------------------------------------------------------------------------- under torchrun


def test_run_train_sh_exits_with_75_when_it_is_signalled(tmp_path):
    stopped(tmp_path, "script", signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_run_train_sh_takes_other_signals_too(tmp_path, number):
    stopped(tmp_path, "script", number)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["first worker", "last worker", "everybody"])
def test_run_train_sh_exits_with_75_whoever_is_signalled(tmp_path, who):
    """Not 1, nor started again, which a worker's status 75 would mean to torchrun."""
    stopped(tmp_path, who, signal.SIGTERM)


@pytest.mark.slow
def test_a_save_may_take_longer_than_torchrun_waits(tmp_path):
    """Torchrun itself kills its workers after 30 seconds, here after one."""
    hindered = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1", "TITAN_TEST_SLOW_SAVE_S": "6"}
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SLOW_SAVE)
    stopped(tmp_path, "script", signal.SIGTERM, PYTHONPATH=str(site), **hindered)
    (seconds,) = [e["seconds"] for e in events.read(tmp_path / "run") if e["kind"] == "save"]
    assert seconds >= 6


@pytest.mark.slow
def test_a_signal_on_one_node_stops_the_others_with_75_too(tmp_path):
    """And none waits for another's torchrun, as it would for one that a signal has ended."""
    output, port = tmp_path / "run", str(free_port())
    settings = words(output, CHANGES | {"training__steps": "1000"})
    env = {"NNODES": "2", "RDZV_ENDPOINT": f"localhost:{port}", "NGPU": "1", "MAX_RESTARTS": "2"}
    nodes = [start(settings, env) for _ in range(2)]
    try:
        wait_for(lambda: (output / "metrics.jsonl").exists() and curve(output), nodes[0])
        os.kill(nodes[1].pid, signal.SIGUSR1)
        since = time.monotonic()
        said = [node.communicate(timeout=120)[1] for node in nodes]
        assert time.monotonic() - since < 100  # torchrun waits 300 s for a lost node
    finally:
        end(*nodes)
    assert [node.returncode for node in nodes] == [75, 75], said
    told = [event["kind"] for event in events.read(output)]
    assert told == ["start", "signal", "save", "stop"]


@pytest.mark.slow
def test_a_run_goes_on_without_a_node_that_is_lost(tmp_path):
    output, port = tmp_path / "run", str(free_port())
    changes = {"training__steps": "40", "checkpoint__every": "2", "parallelism__ep": "1"}
    settings = words(output, CHANGES | changes)
    env = {"NNODES": "1:2", "RDZV_ENDPOINT": f"localhost:{port}", "NGPU": "1", "MAX_RESTARTS": "3"}
    first = start(settings, env)
    time.sleep(3)  # the first has the store
    second = start(settings, env)
    try:
        wait_for(lambda: 2 in ranks(output) and saves(output), first)
        for pid in [second.pid, *children(second.pid)]:
            kill(pid)
        _, said = first.communicate(timeout=400)
    finally:
        end(first, second)
    assert first.returncode == 0, said
    assert ranks(output)[-1] == 1
    resumed = [event for event in events.read(output) if event["kind"] == "resume"]
    assert resumed[-1]["ranks_saved"] == 2 and resumed[-1]["step"] >= 2
    assert [step for step, *_ in curve(output)] == list(range(1, 41))


def ranks(output):
    return [event["ranks"] for event in events.read(output) if event["kind"] == "start"]


def saves(output):
    return [event["step"] for event in events.read(output) if event["kind"] == "save"]


SLOW_SAVE = """
import importlib.abc, importlib.util, os, sys, time
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "titan_vlm.training.checkpoint":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def slow(module):
            load(module)
            write = module.Checkpointer._write
            def written(*given):
                time.sleep(float(os.environ["TITAN_TEST_SLOW_SAVE_S"]))
                write(*given)
            module.Checkpointer._write = written
        spec.loader.exec_module = slow
        return spec
sys.meta_path.insert(0, Slow())
"""


def stopped(tmp_path, who, number, **env):
    """Start a run of two ranks, signal `who`, and see that it ends well and once only."""
    output = tmp_path / "run"
    settings = words(output, CHANGES | {"training__steps": "1000", "data__num_workers": "1"})
    script = start(settings, {"NGPU": "2", "MAX_RESTARTS": "2"} | env)
    try:
        wait_for(lambda: (output / "metrics.jsonl").exists() and curve(output), script)
        workers = children(script.pid)
        assert len(workers) == 2
        signalled = {
            "script": [script.pid],
            "first worker": workers[:1],
            "last worker": workers[1:],
            "everybody": [script.pid, *workers, *children(*workers)],
        }
        for pid in signalled[who]:
            os.kill(pid, number)
        _, said = script.communicate(timeout=90)
    finally:
        end(script)
    assert script.returncode == 75, said
    told = events.read(output)
    assert [event["kind"] for event in told] == ["start", "signal", "save", "stop"]
    (folder,) = (output / "checkpoints").glob("step-*")
    assert folder.name == f"step-{told[-1]['step']:06d}"


def start(settings, env):
    env = {"OMP_NUM_THREADS": "1", "TITAN_NO_VENV": "1", "TITAN_PYTHON": sys.executable} | env
    return subprocess.Popen(
        ["./run_train.sh", "--config", "qwen_vlm_moe.toml", *settings],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(*scripts):
    """Whatever is left of them, which is nothing where all is well."""
    for script in scripts:
        for pid in [*children(script.pid), script.pid]:
            kill(pid)
        script.wait()
        script.stdout.close()
        script.stderr.close()


def children(*pids):
    found = []
    for pid in pids:
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, file.read_text().split())
    return sorted(found)


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_for(condition, script, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert script.poll() is None, script.communicate()[1]
        assert time.monotonic() < end, "the run does not begin"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while they train", "while they import"])
def test_ranks_do_not_train_on_without_their_launcher(tmp_path, when):
    output = tmp_path / "run"
    script = start(words(output, CHANGES | {"training__steps": "1000"}), {"NGPU": "2"})
    try:
        if when == "while they train":
            wait_for(lambda: (output / "metrics.jsonl").exists() and curve(output), script)
        else:
            wait_for(lambda: len(trainers(script.pid)) == 2, script)
        workers = trainers(script.pid)
        kill(script.pid)
        script.wait()
        until = time.monotonic() + 60
        while any(map(is_running, workers)):
            assert time.monotonic() < until, "they train on"
            time.sleep(0.1)
    finally:
        end(script)
        for worker in workers:
            kill(worker)
    told = [event["kind"] for event in events.read(output)]
    saved = ["save"] if when == "while they train" else []
    assert told == ["start", "signal", *saved, "stop"]


def trainers(pid):
    """Of the children of run_train.sh, which first asks other processes."""
    return [child for child in children(pid) if b"titan_vlm.train" in command(child)]


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
