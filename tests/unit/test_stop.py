"""A run that is told to stop: it finishes its step, saves, and the same command goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.small_run import curve, run, words
from titan_vlm import events, launched, train
from titan_vlm.evaluation.validate import Validator
from titan_vlm.training.stop import SIGNALS, Stop

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"checkpoint__every": "0", "checkpoint__export_hf": "false", "training__steps": "4"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The curve of the run that nobody stops."""
    output = tmp_path_factory.mktemp("whole")
    assert run(output, **SHORT) == 0
    return curve(output)


def signalled_in(monkeypatch, name, number, at=lambda run: True, of=train):
    """Let the process signal itself in `of`.`name` once, where `at(its first argument)`."""
    function, sent = getattr(of, name), []

    def wrapped(*given, **more):
        if not sent and at(given[0]):
            sent.append(number)
            os.kill(os.getpid(), number)
        return function(*given, **more)

    monkeypatch.setattr(of, name, wrapped)


def saved(output):
    return sorted(path.name for path in (output / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on(
    tmp_path, monkeypatch, capfd, whole, number
):
    before = {n: signal.getsignal(n) for n in SIGNALS}
    with monkeypatch.context() as patch:
        signalled_in(patch, "train_step", number, at=lambda state: state.step == 1)
        assert run(tmp_path, **SHORT) == 75
    told = f"{number.name}: finishing step 2, then saving; once more to exit at once\n"
    assert told in capfd.readouterr().err
    assert saved(tmp_path) == ["step-000002"]
    stop = events.read(tmp_path)[-1]
    assert (stop["kind"], stop["step"]) == ("stop", 2)
    assert (stop["reason"], stop["signal"]) == ("signal", number.name)
    assert {n: signal.getsignal(n) for n in SIGNALS} == before
    assert "signals" not in [thread.name for thread in threading.enumerate()]

    assert run(tmp_path, **SHORT) == 0
    assert curve(tmp_path) == whole
    assert events.read(tmp_path)[-1]["reason"] == "finished"


@pytest.mark.parametrize(
    ("of", "name", "steps"),
    [
        (train, "prepare", []),
        (Validator, "run", ["step-000002"]),
        (train, "save", ["step-000002"]),
    ],
    ids=["prepare", "validate", "save"],
)
def test_a_signal_outside_a_step_begins_no_other_step(tmp_path, monkeypatch, of, name, steps):
    changes = SHORT | {"checkpoint__every": "2", "eval__every": "2", "eval__samples": "1"}
    signalled_in(monkeypatch, name, signal.SIGTERM, of=of)
    assert run(tmp_path, **changes) == 75
    assert saved(tmp_path) == steps
    assert len(curve(tmp_path)) == 2 * len(steps)
    saves = [event["step"] for event in events.read(tmp_path) if event["kind"] == "save"]
    assert saves == [2] * len(steps)  # nor is a step saved twice


def test_what_is_signalled_in_the_last_step_is_finished(tmp_path, monkeypatch):
    signalled_in(monkeypatch, "train_step", signal.SIGTERM, at=lambda state: state.step == 3)
    assert run(tmp_path, **SHORT) == 0
    assert events.read(tmp_path)[-1]["reason"] == "finished"


def test_max_hours_count_from_the_launch_and_leave_every_start_a_step(tmp_path, monkeypatch, whole):
    """Else a limit below the time of starting would have a job queued again for ever."""
    monkeypatch.setenv(launched.BEGAN, str(time.time() - 7200))
    for step in (1, 2):
        assert run(tmp_path, **SHORT, training__max_hours="1") == 75
        assert saved(tmp_path)[-1] == f"step-{step:06d}"
        assert events.read(tmp_path)[-1]["reason"] == "max_hours"
    assert run(tmp_path, **SHORT, training__max_hours="3") == 0
    assert curve(tmp_path) == whole


def test_an_error_leaves_its_line_and_the_log_its_traceback(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("the\nreason")

    monkeypatch.setattr(train, "train_step", broken)
    with pytest.raises(RuntimeError):
        run(tmp_path, **SHORT)
    stop = events.read(tmp_path)[-1]
    assert (stop["kind"], stop["reason"]) == ("stop", "error")
    assert stop["error"] == "RuntimeError: the reason"
    log = (tmp_path / "logs" / "rank0.log").read_text()
    assert "Traceback (most recent call last)" in log and "in broken" in log


# ---------------------------------------------------------------------------- signals alone


def test_a_request_that_comes_twice_is_one_and_one_that_is_repeated_is_two(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: stop._signal)
        time.sleep(0.1)
        assert not ended
        time.sleep(launched.REPEAT_S)
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: ended)
    assert ended == [128 + signal.SIGINT]


STUCK = """
import ctypes, os, signal
from titan_vlm.training.stop import Stop
pipe, libc = os.pipe(), ctypes.CDLL(None)
with Stop() as stop:
    signal.alarm(60)
    print("in", flush=True)
    libc.read(pipe[0], ctypes.create_string_buffer(1), 1)  # for ever, in C, like a collective
"""


def test_a_second_signal_ends_a_process_whose_main_thread_is_stuck_in_c():
    with python("-c", STUCK) as process:
        assert process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline().startswith("SIGTERM: ending as soon as all is set up")
        time.sleep(launched.REPEAT_S)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert "SIGUSR1 again: exiting at once" in process.stderr.readline()
        assert process.wait(20) == 128 + signal.SIGUSR1


ORPHAN = """
from titan_vlm.training.stop import Stop
import time
with Stop() as stop:
    time.sleep(0.5)
    print(stop.agreed(0), stop.reason, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells of a parent's death on Linux")
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_trainer_whose_launcher_died_while_it_imported_ends(tmp_path, monkeypatch, is_gone):
    monkeypatch.setenv(launched.FOLDER, str(tmp_path))
    launcher = os.getpid()
    if is_gone:
        with python("-c", "") as process:
            process.wait()
            launcher = process.pid
    monkeypatch.setenv(launched.LAUNCHER, str(launcher))
    with python("-c", ORPHAN) as process:
        assert process.stdout.read() == ("True SIGTERM\n" if is_gone else "False \n")
        assert process.wait(60) == 0


def test_a_ctrl_c_that_the_shell_has_turned_off_stays_off():
    """As of a script's background processes, and under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: stop._signal)
            assert stop._signal == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_left_alone():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def other():
        with Stop() as stop:
            seen.append([signal.getsignal(number) for number in SIGNALS])
            seen.append(stop.agreed(0))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before, False]


# ---------------------------------------------------------------------------- data workers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_data_workers_outlive_a_signal_to_all_and_end_with_their_rank(tmp_path, number):
    """A terminal, torchrun and SLURM signal all processes of a rank."""
    with trainer(tmp_path, **SHORT | {"training__steps": "1000", "data__num_workers": "2"}) as rank:
        until(lambda: (tmp_path / "metrics.jsonl").exists() and curve(tmp_path))
        workers = children(rank.pid)
        assert len(workers) == 2
        os.killpg(rank.pid, number)
        assert rank.wait(60) == 75, rank.stderr.read()
        until(lambda: not any(map(is_there, workers)))
    assert events.read(tmp_path)[-1]["reason"] == "signal"


def test_data_workers_end_when_their_rank_is_killed(tmp_path):
    with trainer(tmp_path, **SHORT | {"training__steps": "1000", "data__num_workers": "2"}) as rank:
        until(lambda: (tmp_path / "metrics.jsonl").exists() and curve(tmp_path))
        workers = children(rank.pid)
        assert len(workers) == 2
        rank.kill()
        rank.wait()
        until(lambda: not any(map(is_there, workers)))


def trainer(output, **changes):
    settings = ["--config", "qwen_vlm_moe.toml", *words(output, changes)]
    return python("-m", "titan_vlm.train", *settings, start_new_session=True)


def python(*given, **options):
    return subprocess.Popen(
        [sys.executable, *given],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_there(pid):
    """Running, not merely waiting to be reaped by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
