"""What a run tells about itself: events.jsonl, run.json, the logs of its ranks."""

import contextlib
import errno
import fcntl
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from pathlib import Path

import pytest

from tests.small_run import curve, run, run_killed
from titan_vlm import events, lock, logs, run_dir, train
from titan_vlm.data.ledger import read_ledger
from titan_vlm.training.checkpoint import Checkpointer
from titan_vlm.training.metrics import Board

SHORT = {"training__steps": "2", "checkpoint__export_hf": "false", "checkpoint__every": "0"}


@pytest.fixture(autouse=True)
def ends():
    yield
    events.close()
    logs.end()


def test_events_are_read_as_they_were_written(tmp_path):
    events.open_for(tmp_path)
    events.write("save", step=7, seconds=1.5, bytes=12)
    events.write("stop", reason="finished", where=tmp_path)
    events.close()
    save, stop = events.read(tmp_path)
    assert (save["kind"], save["step"], save["seconds"], save["bytes"]) == ("save", 7, 1.5, 12)
    assert stop["step"] is None and stop["where"] == str(tmp_path)
    assert save["time"] <= stop["time"] and save["time"].endswith("+00:00")


@pytest.mark.parametrize("torn", ['{"time": "2026', '{"kind": "save", "step": 1}', "\xff[1]"])
def test_a_line_that_a_killed_process_left_is_no_obstacle(tmp_path, torn):
    """Whole but for its end, it is kept; what comes next is a line of its own."""
    (tmp_path / events.NAME).write_text('{"kind": "start", "step": 0}\n' + torn)
    events.open_for(tmp_path)
    events.write("resume", step=5)
    events.close()
    kinds = [event["kind"] for event in events.read(tmp_path)]
    assert kinds == ["start", *(["save"] if torn.endswith("}") else []), "resume"]


def test_outside_a_run_events_go_nowhere(tmp_path):
    events.write("save", step=1)
    assert events.read(tmp_path) == []
    events.open_for(tmp_path)
    events.close()
    events.write("save", step=1)
    assert events.read(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_warning_and_not_the_end(tmp_path, caplog, monkeypatch):
    with pytest.raises(OSError), open("/dev/full", "w") as full:  # closing it fails, too
        monkeypatch.setattr(events, "_file", full)
        events.write("save", step=1)
        monkeypatch.setattr(events, "_file", None)
    assert caplog.messages == ["events.jsonl: No space left on device"]


def test_threads_do_not_tear_each_others_lines(tmp_path):
    events.open_for(tmp_path)
    threads = [
        threading.Thread(target=lambda: [events.write("skip", text="x" * 5000) for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(events.read(tmp_path)) == 200


def test_a_run_tells_its_starts_its_saves_and_its_end(tmp_path, monkeypatch):
    assert run(tmp_path, **SHORT) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert run(tmp_path, **SHORT | {"training__steps": "3"}) == 0
    told = events.read(tmp_path)
    kinds = [event["kind"] for event in told]
    assert kinds == ["start", "save", "stop", "start", "restart", "resume", "save", "stop"]
    mesh = dict.fromkeys(("pp", "dp_replicate", "dp_shard", "ep", "tp"), 1)
    assert (told[0]["mesh"], told[0]["pid"]) == (mesh, os.getpid())
    assert told[4]["count"] == 2
    assert (told[5]["step"], told[5]["mesh"], told[5]["ranks_saved"]) == (2, mesh, 1)
    files = (tmp_path / "checkpoints" / "step-000003").iterdir()
    assert told[6]["bytes"] == sum(file.stat().st_size for file in files) > 1e6
    assert told[6]["step"] == 3 and told[6]["seconds"] > 0
    assert (told[7]["step"], told[7]["reason"]) == (3, "finished")


def test_a_refusal_is_told_and_changes_neither_config_nor_run_json(tmp_path):
    assert run(tmp_path, **SHORT) == 0
    before = [(tmp_path / name).read_text() for name in ("config.toml", "run.json")]
    assert run(tmp_path, **SHORT | {"run__seed": "9", "training__steps": "3"}) == 2
    assert [(tmp_path / name).read_text() for name in ("config.toml", "run.json")] == before
    stop = events.read(tmp_path)[-1]
    assert (stop["kind"], stop["reason"]) == ("stop", "refused")
    assert "run.seed = 9" in stop["error"] and "\n" not in stop["error"]
    log = (tmp_path / "logs" / "rank0.log").read_text()
    assert "ERROR titan_vlm: ConfigError: run.seed = 9" in log and "Traceback" not in log


def test_run_json_says_what_ran_where(tmp_path):
    import torch

    assert run(tmp_path, **SHORT) == 0
    about = json.loads((tmp_path / "run.json").read_text())
    config = tomllib.loads((tmp_path / "config.toml").read_text())
    assert about["flavor"] == config["model"]["flavor"] == "debug_moe"
    assert (about["steps"], about["ranks"], about["mesh"]["dp_shard"]) == (2, 1, 1)
    assert about["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert about["versions"]["python"] and "torchao" in about["versions"]
    assert about["versions"]["cuda"] == torch.version.cuda


def test_the_commit_is_that_of_the_program_and_dirty_when_its_files_differ(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    assert run_dir.git_commit(package) is None
    git("init", "-q")
    assert run_dir.git_commit(package) is None  # somebody else's repository
    git("add", ".")
    git("commit", "-qm", "first")
    assert run_dir.git_commit(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "runs").mkdir()
    assert not run_dir.git_commit(package)["dirty"]
    (package / "a.py").write_text("2\n")
    assert run_dir.git_commit(package)["dirty"]


def test_a_machine_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_dir.git_commit(Path(__file__).parent) is None


def test_the_log_of_a_rank_has_messages_warnings_and_exceptions_of_threads(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    monkeypatch.setattr(warnings, "showwarning", lambda *given: heard.append(given))
    root, show, hook = logging.getLogger(), warnings.showwarning, threading.excepthook
    before = root.level, list(root.handlers)
    logs.begin(tmp_path / "rank1.log", is_shown=False)
    logging.getLogger("titan_vlm").info("a message")
    warnings.warn("beware", stacklevel=1)

    def broken():
        raise KeyError("lost")

    thread = threading.Thread(target=broken, name="writer")
    thread.start()
    thread.join()
    logs.end()
    logging.getLogger("titan_vlm").warning("too late")
    text = (tmp_path / "rank1.log").read_text()
    assert " INFO titan_vlm: a message\n" in text and "UserWarning: beware\n" in text
    assert "in thread writer" in text and "KeyError: 'lost'" in text
    assert "too late" not in text and len(heard) == 2  # whoever listened before
    assert (root.level, list(root.handlers)) == before
    assert (warnings.showwarning, threading.excepthook) == (show, hook)


def test_a_log_is_appended_to(tmp_path):
    for text in ("first", "second"):
        logs.begin(tmp_path / "rank0.log", is_shown=True)
        logs.write(logging.INFO, text)
        logs.end()
    lines = (tmp_path / "rank0.log").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second"]


def test_two_runs_in_one_directory_are_refused(tmp_path, monkeypatch, capfd):
    """Nor in one for checkpoints, with directories of their own."""
    monkeypatch.setattr(lock, "WAIT_S", 0.1)
    first, second, shared = tmp_path / "first", tmp_path / "second", tmp_path / "shared"
    for place, key in ((first, "run.output_dir"), (shared, "checkpoint.directory")):
        with held(place):
            assert run(first, **SHORT, checkpoint__directory=str(shared)) == 2
        said = f"{key} = {place}: process 7 on there is still training here"
        assert said in capfd.readouterr().err
    assert run(second, **SHORT, checkpoint__directory=str(shared)) == 0
    assert f"process {os.getpid()} on" in (shared / ".lock").read_text()


def test_a_data_worker_does_not_hold_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.dist, "get_rank", lambda: 0)
    lock.take(tmp_path, "run.output_dir")
    begun = multiprocessing.get_context("fork").Event()
    worker = multiprocessing.get_context("fork").Process(target=wait_for_its_end, args=(begun,))
    worker.start()
    try:
        assert begun.wait(60) and is_locked(tmp_path)  # by this process
        lock.release()
        assert not is_locked(tmp_path)
    finally:
        worker.kill()
        worker.join()


def test_while_a_thread_still_saves_a_run_that_failed_has_its_directory(tmp_path, monkeypatch):
    """As long as the process lives: no other run may find half of what is being written."""
    may_end, train_step, write = threading.Event(), train.train_step, Checkpointer._write

    def fails(state, metrics):
        if state.step == 1:
            raise RuntimeError("something that nobody thought of")
        train_step(state, metrics)

    def slow(*args):
        assert may_end.wait(60)
        write(*args)

    monkeypatch.setattr(train, "train_step", fails)
    monkeypatch.setattr(Checkpointer, "_write", slow)
    changes = SHORT | {"checkpoint__every": "1", "checkpoint__async_save": "true"}
    try:
        with pytest.raises(RuntimeError, match="nobody thought of"):
            run(tmp_path, **changes)
        assert is_locked(tmp_path) and is_locked(tmp_path / "checkpoints")
    finally:
        may_end.set()
        lock.release()


def wait_for_its_end(begun):
    begun.set()
    time.sleep(600)


def is_locked(folder):
    with (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_restart_waits_for_the_lock_of_a_machine_that_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_S", 0.1)
    monkeypatch.setattr(lock.dist, "get_rank", lambda: 0)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with held(tmp_path) as holder:
        threading.Timer(1, holder.kill).start()
        lock.take(tmp_path, "run.output_dir")
    lock.release()


@pytest.mark.parametrize("number", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_where_nothing_can_be_locked_a_run_starts_with_a_warning(
    tmp_path, monkeypatch, caplog, number
):
    def flock(*_):
        raise OSError(getattr(errno, number), "not here")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    monkeypatch.setattr(lock.dist, "get_rank", lambda: 0)
    lock.take(tmp_path, "run.output_dir")
    lock.release()
    assert "cannot be locked (not here): see to it that no other run uses it" in caplog.text


@contextlib.contextmanager
def held(folder):
    """The lock on a folder in another process's hands."""
    folder.mkdir(exist_ok=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 7 on there")
file.flush()
print("locked", flush=True)
time.sleep(60)
"""


def test_a_run_that_begins_anew_beside_its_history_says_so_and_keeps_it(world, tmp_path):
    """Its folder of checkpoints may be mistyped or not be mounted."""
    assert world.run(2, run_with_ledger, tmp_path, "2") == [0, 0]
    log = tmp_path / "logs" / "rank0.log"
    assert "beginning anew" not in log.read_text()
    files = ("metrics.jsonl", "moe.jsonl", "ledger/reader0.jsonl", "ledger/reader1.jsonl")
    before = [(tmp_path / name).read_text() for name in files]
    assert all(before)
    (tmp_path / "checkpoints").rename(tmp_path / "lost")

    assert world.run(2, run_with_ledger, tmp_path, "2", "7") == [2, 2]  # refused for its data
    assert [(tmp_path / name).read_text() for name in files] == before
    assert world.run(2, run_killed_with_ledger, tmp_path) == [None, None]
    assert "tells of a save after step 2, but" in log.read_text()
    assert [(tmp_path / "before1" / name).read_text() for name in files] == before
    assert world.run(2, run_with_ledger, tmp_path, "3") == [0, 0]  # nothing was saved in between
    assert not (tmp_path / "before2").exists() and log.read_text().count("beginning anew") == 1
    assert list(read_ledger(tmp_path)) == [1, 2, 3] == [step for step, *_ in curve(tmp_path)]


WITH_LEDGER = SHORT | {"data__ledger": "true"}


def run_with_ledger(output, steps, shards="4"):
    return run(output, **WITH_LEDGER | {"training__steps": steps, "data__virtual_shards": shards})


def run_killed_with_ledger(output):
    return run_killed(output, 1, **WITH_LEDGER)


def test_a_full_disk_costs_tensorboard_and_not_the_run(caplog):
    class Full:
        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

    board = Board(Full())
    board.add_scalar("loss", 1.0, 1)
    board.add_scalar("loss", 1.0, 2)
    board.close()
    assert caplog.text.count("TensorBoard gets no more events") == 1
