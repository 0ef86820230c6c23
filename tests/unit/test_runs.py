"""scripts/runs.py: which runs there are, how they ended, what can be resumed from."""

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time

import fsspec
import pytest

from scripts import runs
from tests.small_run import run
from titan_vlm import events
from titan_vlm.training import manifest


def make_run(folder, told=(), steps=100, losses=((1, 2.5), (12, 1.25)), start=None):
    """What a run leaves, as its own code writes it."""
    folder.mkdir(parents=True)
    mesh = {"pp": 1, "dp_replicate": 1, "dp_shard": 4, "ep": 2, "tp": 1}
    about = {"model": "qwen3_vl", "flavor": "debug_moe", "steps": steps, "mesh": mesh}
    (folder / "run.json").write_text(json.dumps(about))
    records = [{"step": step, "loss": loss} for step, loss in losses]
    lines = [json.dumps(record) for record in [*records, {"step": 12, "eval/loss": 9.0}]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 13, "lo')
    events.open_for(folder)
    events.write("start", **(start or {"host": platform.node(), "pid": os.getpid()}))
    for kind, fields in told:
        events.write(kind, **fields)
    events.close()


def make_checkpoint(folder, step, suffix=""):
    path = folder / "checkpoints" / f"step-{step:06d}{suffix}"
    path.mkdir(parents=True)
    data = bytes(range(200)) * 5
    (path / "a.bin").write_bytes(data)
    said = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_bytes(manifest.make(step, {"a.bin": said}, {}))
    return path


def listed(directory, *words):
    """{name: run} of `--json`, and the status."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = runs.main([str(directory), "--json", *words])
    return {run["name"]: run for run in json.loads(out.getvalue())}, status


def gone():
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_every_way_to_end_is_told(tmp_path):
    ends = {
        "finished": [("stop", {"reason": "finished", "step": 100})],
        "stopped by SIGUSR1": [("stop", {"reason": "signal", "signal": "SIGUSR1", "step": 12})],
        "stopped by training.max_hours": [("stop", {"reason": "max_hours"})],
        "error: DataError: bad": [("stop", {"reason": "error", "error": "DataError: bad"})],
        "last start refused: no": [("stop", {"reason": "refused", "error": "no"})],
        "running?": [],
        "unknown (killed)": [],
    }
    for i, (state, told) in enumerate(ends.items()):
        start = {"host": platform.node(), "pid": gone()} if state == "unknown (killed)" else None
        make_run(tmp_path / f"run{i}", told, start=start)
    found, status = listed(tmp_path)
    assert [run["state"] for run in found.values()] == list(ends)
    assert status == 0


def test_a_run_of_another_machine_is_judged_by_its_files(tmp_path):
    make_run(tmp_path / "a", start={"host": "elsewhere", "pid": 1})
    assert listed(tmp_path)[0]["a"]["state"] == "running?"
    old = time.time() - runs.RECENT_S - 60
    for file in (tmp_path / "a").iterdir():
        os.utime(file, (old, old))
    assert listed(tmp_path)[0]["a"]["state"] == "unknown (killed)"


def test_what_ended_before_the_newest_start_is_past(tmp_path):
    again = ("start", {"host": platform.node(), "pid": gone()})
    error = ("stop", {"reason": "error", "error": "x"})
    make_run(tmp_path / "a", [error, again, error, again])
    run = listed(tmp_path)[0]["a"]
    assert (run["state"], run["restarts"]) == ("unknown (killed)", 2)


def test_a_start_that_was_refused_is_no_restart(tmp_path):
    again = ("start", {"host": platform.node(), "pid": gone()})
    refused = ("stop", {"reason": "refused", "error": "x"})
    make_run(tmp_path / "a", [refused, again, ("stop", {"reason": "finished"}), again, refused])
    assert listed(tmp_path)[0]["a"]["restarts"] == 0
    make_run(tmp_path / "b", [refused])
    assert listed(tmp_path)[0]["b"]["restarts"] == 0


def test_progress_loss_and_mesh(tmp_path):
    make_run(tmp_path / "deep" / "er", [("stop", {"reason": "signal", "step": 14})])
    run = listed(tmp_path)[0]["deep/er"]
    assert (run["step"], run["steps"], run["loss"]) == (14, 100, 1.25)
    assert run["mesh"] == {"dp_shard": 4, "ep": 2}
    assert (run["model"], run["flavor"]) == ("qwen3_vl", "debug_moe")


def test_checkpoints_are_checked_by_size_and_with_verify_by_checksum(tmp_path, capsys):
    make_run(tmp_path / "a")
    for step in (5, 10, 15, 1000000):
        make_checkpoint(tmp_path / "a", step)
    make_checkpoint(tmp_path / "a", 20, ".tmp")
    short = tmp_path / "a" / "checkpoints" / "step-000010" / "a.bin"
    short.write_bytes(short.read_bytes()[:-1])
    flipped = tmp_path / "a" / "checkpoints" / "step-000015" / "a.bin"
    flipped.write_bytes(b"\1" + flipped.read_bytes()[1:])

    found, status = listed(tmp_path)
    quick = {c["folder"]: (c["complete"], bool(c["problems"])) for c in found["a"]["checkpoints"]}
    assert quick == {
        "step-000005": (True, False),
        "step-000010": (True, True),
        "step-000015": (True, False),
        "step-000020.tmp": (False, False),
        "step-1000000": (True, False),
    }
    assert list(quick)[-1] == "step-1000000" and status == 1
    found, status = listed(tmp_path, "--verify")
    whole = {c["folder"]: bool(c["problems"]) for c in found["a"]["checkpoints"]}
    assert whole == {name: damaged for name, (_, damaged) in quick.items()} | {"step-000015": True}

    assert runs.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["run", "model", "steps", "mesh", "loss", "state", "restarts"]
    assert "12/100  dp_shard 4 x ep 2  1.2500  running?" in out[1]
    assert "valid" in out[2] and "damaged: " in out[3] and "incomplete (step-000020.tmp)" in out[5]


def test_a_run_as_the_trainer_leaves_it(tmp_path):
    """A run's own folders, hf/ with its config for one, are no runs."""
    settings = {"training__steps": "2", "checkpoint__every": "0"}
    assert run(tmp_path / "mine", **settings) == 0
    shutil.rmtree(tmp_path / "mine" / "checkpoints")  # of whatever format
    found, _ = listed(tmp_path)
    assert list(found) == ["mine"]
    assert (found["mine"]["step"], found["mine"]["steps"], found["mine"]["state"]) == (
        2,
        2,
        "finished",
    )
    assert found["mine"]["loss"] > 0
    (tmp_path / "mine" / "run.json").unlink()
    (tmp_path / "mine" / "events.jsonl").unlink()
    older = listed(tmp_path / "mine")[0]["mine"]
    assert (older["flavor"], older["steps"], older["state"]) == ("debug_moe", 2, "unknown (killed)")


def test_nothing_to_list_is_said_in_one_line(tmp_path, capsys):
    for directory, said in ((tmp_path, "no run in it or below"), (tmp_path / "x", "no such dir")):
        assert runs.main([str(directory)]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "events.jsonl"])
def test_a_file_that_is_rubbish_does_not_hide_the_others(tmp_path, name):
    make_run(tmp_path / "a", [("stop", {"reason": "finished"})])
    make_run(tmp_path / "b", [("stop", {"reason": "finished"})])
    (tmp_path / "a" / name).write_bytes(b"\xff\x00{[")
    assert listed(tmp_path)[0]["b"]["state"] == "finished"


def test_checkpoints_elsewhere_are_looked_at_there(tmp_path):
    make_run(tmp_path / "runs" / "a")
    make_checkpoint(tmp_path / "elsewhere", 5)
    directory = tmp_path / "elsewhere" / "checkpoints"
    with (tmp_path / "runs" / "a" / "config.toml").open("a") as file:
        file.write(f'[checkpoint]\ndirectory = "{directory}"\n')
    (checkpoint,) = listed(tmp_path / "runs", "--verify")[0]["a"]["checkpoints"]
    assert (checkpoint["step"], checkpoint["problems"]) == (5, [])


def test_what_an_object_store_is_being_given_is_not_damaged(tmp_path):
    make_run(tmp_path / "a")
    make_checkpoint(tmp_path, 5)
    directory = f"memory://{tmp_path.name}"
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "checkpoints"), f"/{tmp_path.name}", recursive=True)
    store.pipe_file(f"/{tmp_path.name}/step-000010/__0_0.distcp", b"half of it")
    with (tmp_path / "a" / "config.toml").open("a") as file:
        file.write(f'[checkpoint]\ndirectory = "{directory}"\n')
    found, status = listed(tmp_path)
    told = [(c["step"], c["complete"], c["problems"]) for c in found["a"]["checkpoints"]]
    assert told == [(5, True, []), (10, False, [])] and status == 0
