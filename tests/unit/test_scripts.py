"""The shell scripts and the launcher: what they run, in what order, and what the user sees.

No test makes an environment or trains. `TITAN_NO_VENV=1` uses the Python of the tests; where the
question is what a script would run, TITAN_PYTHON is a shell script that writes its words down.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from scripts import convert

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["run_train.sh", "scripts/setup_env.sh", "scripts/test.sh", ".ci/run"]


def run(*words, **env) -> subprocess.CompletedProcess:
    """A command with TITAN_NO_VENV=1 and none of the variables that the scripts read."""
    read = ("NGPU", "NNODES", "NODE_RANK", "MASTER_", "RDZV_", "LOG_RANK", "OMP_NUM", "CUDA_VIS")
    clean = {k: v for k, v in os.environ.items() if not k.startswith((*read, "TITAN_"))}
    clean |= {"TITAN_NO_VENV": "1", "TITAN_PYTHON": sys.executable} | env
    return subprocess.run(words, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=120)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_script_parses_and_is_executable(name):
    assert run("bash", "-n", name).returncode == 0
    assert os.access(ROOT / name, os.X_OK)


# --- run_train.sh -------------------------------------------------------------------------------


@pytest.fixture
def launched(tmp_path):
    """Runs run_train.sh with a launcher that only writes down its words and thread count, and
    optionally an nvidia-smi that lists some GPUs. Returns (process, what torchrun was told)."""
    told = tmp_path / "told"
    python = script(
        tmp_path / "python",
        f"""for word in "$@"; do
            case $word in */launch.py) echo "${{OMP_NUM_THREADS:-unset}} $*" >{told}; exit ;; esac
        done
        exec {sys.executable} "$@"
        """,
    )

    def call(*words, gpus=0, **env):
        lines = "".join(f'echo "GPU {i}: some name"\necho "  MIG 1g"\n' for i in range(gpus))
        script(tmp_path / "nvidia-smi", lines + f"exit {0 if gpus else 9}\n")
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = run("./run_train.sh", *words, TITAN_PYTHON=python, PATH=path, **env)
        return done, told.read_text().strip() if told.exists() else None

    return call


def test_help_and_print_config_start_no_torchrun(launched):
    done, told = launched("--help")
    assert (done.returncode, told, done.stderr) == (0, None, "")
    assert "--training.steps" in done.stdout
    done, told = launched("--config", "qwen_vlm_moe.toml", "--run.seed", "5", "--print-config")
    assert (done.returncode, told, done.stderr) == (0, None, "")
    assert "seed = 5" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "command line: expected --config FILE"),
        (["--config", "nope.toml"], "nope.toml: no such file"),
        (
            ["--config", "qwen_vlm_moe.toml", "--training.stpes", "1"],
            "nearest known: training.steps",
        ),
        (["--config", "cc12m_debug.toml"], "data.path: expected a file, directory or glob"),
    ],
)
def test_a_wrong_config_is_one_line_and_code_2_before_torchrun(words, said, launched):
    done, told = launched(*words)
    assert (done.returncode, told, done.stdout) == (2, None, "")
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


CONFIG = ("--config", "qwen_vlm_moe.toml")


def test_words_reach_the_trainer_unchanged(launched):
    _, told = launched(*CONFIG, "--data.caption_prompt", "What is  this?")
    assert told.endswith(
        "-m titan_vlm.train --config qwen_vlm_moe.toml --data.caption_prompt What is  this?"
    )


def test_one_node_is_standalone_with_one_process_without_gpus(launched):
    done, told = launched(*CONFIG)
    assert done.returncode == 0, done.stderr
    assert "--nnodes 1 --nproc-per-node 1 --local-ranks-filter 0 --standalone" in told


@pytest.mark.parametrize(
    ("gpus", "env", "processes"),
    [
        (3, {}, 3),
        (3, {"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        (3, {"CUDA_VISIBLE_DEVICES": ""}, 1),
        (0, {"CUDA_VISIBLE_DEVICES": "0,1"}, 1),
        (3, {"NGPU": "2"}, 2),
        (0, {"NGPU": "4"}, 4),
    ],
)
def test_processes_are_ngpu_or_the_gpus_present(gpus, env, processes, launched):
    _, told = launched(*CONFIG, gpus=gpus, **env)
    assert f"--nproc-per-node {processes} " in told


def test_cores_are_shared_out_on_cpu_unless_the_user_chose(launched):
    cores = len(os.sched_getaffinity(0))
    assert launched(*CONFIG)[1].split()[0] == str(cores)
    assert launched(*CONFIG, NGPU=str(cores + 1))[1].split()[0] == "1"
    assert launched(*CONFIG, OMP_NUM_THREADS="7")[1].split()[0] == "7"
    assert launched(*CONFIG, gpus=1)[1].split()[0] == "unset"


def test_several_nodes_meet_where_they_are_told(launched):
    _, told = launched(*CONFIG, NNODES="2", RDZV_ENDPOINT="host:1", RDZV_ID="job", LOG_RANK="0,3")
    assert "--nnodes 2 --nproc-per-node 1 --local-ranks-filter 0,3" in told
    assert "--rdzv-backend c10d --rdzv-endpoint host:1 --rdzv-id job" in told
    _, told = launched(*CONFIG, NNODES="2:4", RDZV_ENDPOINT="host:1", MAX_RESTARTS="5")
    assert "--nnodes 2:4 " in told and "--rdzv-endpoint host:1 " in told
    assert "--max-restarts 5 " in told
    _, told = launched(*CONFIG, NNODES="2", MASTER_ADDR="host", NODE_RANK="1")
    assert "--node-rank 1 --master-addr host --master-port 29500" in told


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"NGPU": "two"}, "NGPU: expected a number of at least 1, got 'two'"),
        ({"NGPU": "0"}, "NGPU: expected a number of at least 1, got '0'"),
        ({"NNODES": "2:1"}, "NNODES: expected a number of at least 1, or MIN:MAX"),
        ({"NNODES": "1:2"}, "expected RDZV_ENDPOINT=host:port, where nodes that come and go meet"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS: expected a number, got '-1'"),
        ({"STOP_GRACE_S": "0"}, "STOP_GRACE_S: expected a number of at least 1, got '0'"),
        ({"LOG_RANK": "a"}, "LOG_RANK: expected local ranks such as 0 or 0,3, got 'a'"),
        (
            {"NNODES": "2"},
            "expected RDZV_ENDPOINT=host:port, or MASTER_ADDR=host with NODE_RANK=0..1",
        ),
        ({"NNODES": "2", "MASTER_ADDR": "h"}, "NODE_RANK=0..1"),
    ],
)
def test_a_wrong_environment_variable_is_one_line_and_code_2(env, said, launched):
    done, told = launched(*CONFIG, **env)
    assert (done.returncode, told) == (2, None)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


# --- scripts/launch.py --------------------------------------------------------------------------


def launch(tmp_path, body: str, processes: int = 1, **env) -> subprocess.CompletedProcess:
    worker = tmp_path / "worker.py"
    worker.write_text(f"import os, signal, sys\nrank = int(os.environ['RANK'])\n{body}\n")
    words = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    words += ["--local-ranks-filter", "0", str(worker)]
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env
    return run(sys.executable, "-P", "scripts/launch.py", *words, **env)


def test_a_users_mistake_in_the_trainer_is_its_one_line_and_code_2(tmp_path):
    done = launch(tmp_path, "print('error: data.path: no such file', file=sys.stderr); sys.exit(2)")
    assert (done.returncode, done.stderr) == (2, "error: data.path: no such file\n")


def test_the_failure_of_a_rank_that_is_not_shown_is_told(tmp_path):
    done = launch(tmp_path, "print('shown', rank); sys.exit(7 if rank == 1 else 0)", processes=2)
    assert done.stdout == "shown 0\n"
    assert done.stderr == "error: rank 1 failed (exit code 7); LOG_RANK=1 shows its output\n"
    assert done.returncode == 7


def test_a_killed_worker_is_told_with_its_signal(tmp_path):
    done = launch(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert done.stderr == "error: rank 0 was killed by SIGKILL (often: out of memory)\n"
    assert done.returncode == 128 + signal.SIGKILL


def test_a_recorded_traceback_of_a_rank_that_is_not_shown_is_printed(tmp_path):
    record = "from torch.distributed.elastic.multiprocessing.errors import record\n"
    body = "@record\ndef main():\n    if rank == 1: raise RuntimeError('the reason')\nmain()"
    done = launch(tmp_path, record + body, processes=2)
    assert "RuntimeError: the reason" in done.stderr
    assert done.stderr.endswith("error: rank 1 failed (exit code 1); LOG_RANK=1 shows its output\n")


# A trainer in small: after `begin` it takes signals; it has the launcher send it some.
TRAINER = """import time
from titan_vlm import launched
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append('TERM'))
signal.signal(signal.SIGUSR1, lambda *_: got.append('USR1'))
def signal_launcher(number, n=1):
    os.kill(os.getppid(), number)
    while len(got) < n: time.sleep(0.01)
"""


def test_a_signal_to_the_launcher_reaches_trainers_that_may_take_their_time(tmp_path):
    for name, reaches in (("SIGUSR1", "USR1"), ("SIGHUP", "TERM")):
        body = f"""launched.begin()
signal_launcher(signal.{name})
time.sleep(2)
print('saved after', *got)
sys.exit(launched.end(stopped=True))"""
        done = launch(tmp_path, TRAINER + body)
        assert (done.returncode, done.stdout) == (75, f"saved after {reaches}\n")
        assert done.stderr == ""


def test_a_trainer_that_stopped_is_no_failure_and_not_started_again(tmp_path):
    body = "launched.begin(); print('ran')\nsys.exit(launched.end(stopped=True))"
    done = launch(tmp_path, TRAINER + body, MAX_RESTARTS="3", PET_MAX_RESTARTS="3")
    assert (done.returncode, done.stdout, done.stderr) == (75, "ran\n", "")


def test_a_trainer_started_again_after_the_signal_knows_of_it(tmp_path):
    body = """if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
    launched.begin()
    signal_launcher(signal.SIGTERM)
    sys.exit(3)
print('told', launched.begin())
sys.exit(launched.end(stopped=True))"""
    done = launch(tmp_path, TRAINER + body, PET_MAX_RESTARTS="1")
    assert (done.returncode, done.stdout) == (75, f"told {int(signal.SIGTERM)}\n")


@pytest.mark.parametrize("why", ["a second signal", "the grace is over"])
def test_trainers_that_do_not_end_are_ended(tmp_path, why):
    again = "time.sleep(1.2); signal_launcher(signal.SIGTERM, 2); sys.exit(9)"
    wait = "while len(got) < 2: time.sleep(0.1)\nsys.exit(9)"
    body = "launched.begin()\nsignal_launcher(signal.SIGUSR1)\n"
    done = launch(tmp_path, TRAINER + body + (again if "signal" in why else wait), STOP_GRACE_S="2")
    assert done.returncode == 128 + signal.SIGUSR1
    assert done.stderr.endswith("stopped by SIGUSR1\n")


def test_before_the_trainers_have_begun_there_is_nothing_to_save(tmp_path):
    done = launch(tmp_path, "import time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)")
    assert done.returncode == 75
    assert done.stderr.endswith("stopped by SIGTERM\n")


def test_one_request_that_comes_twice_is_one(tmp_path):
    body = """launched.begin()
signal_launcher(signal.SIGTERM)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(0.5)
print(*got)
sys.exit(launched.end(stopped=True))"""
    done = launch(tmp_path, TRAINER + body)
    assert (done.returncode, done.stdout) == (75, "TERM\n")


def test_when_a_rank_fails_torchruns_sigterm_ends_the_others_at_once(tmp_path):
    """It is no wish to stop: they would finish a step that the failed one is missing in."""
    body = """import time
from titan_vlm.training.stop import Stop
with Stop():
    time.sleep(1 if rank == 1 else 60)
    sys.exit(7)"""
    since = time.monotonic()
    done = launch(tmp_path, body, processes=2)
    assert done.stderr == "error: rank 1 failed (exit code 7); LOG_RANK=1 shows its output\n"
    assert done.returncode == 7
    assert time.monotonic() - since < 30  # when torchrun kills


def test_a_failure_after_the_signal_stays_a_failure(tmp_path):
    done = launch(tmp_path, TRAINER + "launched.begin(); signal_launcher(signal.SIGTERM); exit(7)")
    assert done.returncode == 7


def test_success_is_silent(tmp_path):
    done = launch(tmp_path, "print('trained')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "trained\n", "")


# --- scripts/convert.py -------------------------------------------------------------------------


def test_a_checkpoint_finds_the_config_of_its_run_from_any_directory(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs/mine/checkpoints/step-000100"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    (tmp_path / "runs/mine/config.toml").write_text("[run]\nsed = 1\n")
    for here in (folder.parent, folder, tmp_path):
        monkeypatch.chdir(here)
        source = os.path.relpath(folder, here)
        assert convert.main([source, str(tmp_path / "out")]) == 2
        assert "runs/mine/config.toml: run.sed: unknown key" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_a_size_of_files_that_is_no_size_is_refused(size, capsys):
    with pytest.raises(SystemExit) as caught:
        convert.parse(["a", "b", f"--max-shard-gb={size}"])
    assert caught.value.code == 2
    assert "--max-shard-gb must be positive and finite" in capsys.readouterr().err


# --- scripts/setup_env.sh -----------------------------------------------------------------------


@pytest.fixture
def house(tmp_path):
    """A copy of setup_env.sh and pyproject.toml, and a Python whose venv and pip only take notes.

    `pip` fails while the file `fail` exists and waits while the file `hold` does.
    """
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup_env.sh", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    notes = tmp_path / "notes"
    python = script(
        tmp_path / "python",
        f"""case "$1 $2" in
"-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo venv >>{notes} ;;
"-m pip") echo "pip ${{@:4}}" >>{notes}; while [ -e {tmp_path}/hold ]; do sleep 0.05; done
    [ ! -e {tmp_path}/fail ] ;;
*) exec {sys.executable} "$@" ;;
esac
""",
    )
    script(tmp_path / "nvidia-smi", "exit 9\n")
    return tmp_path, python, notes


def set_up(house, **env) -> subprocess.CompletedProcess:
    root, python, _ = house
    env = {"TITAN_NO_VENV": "0", "TITAN_PYTHON": python} | env
    path = f"{root}:{os.environ['PATH']}"
    return run("bash", str(root / "scripts/setup_env.sh"), PATH=path, **env)


def taken(house) -> list[str]:
    return house[2].read_text().splitlines() if house[2].exists() else []


def test_a_fresh_machine_gets_torch_first_then_the_rest_and_only_once(house):
    root = house[0]
    done = set_up(house)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{root}/.venv/bin/python\n"
    assert taken(house) == ["venv", "pip torch==2.13.0", f"pip -e {root}[dev]"]
    assert [line[:11] for line in done.stderr.splitlines()][:3] == [
        f"set-up: {i}/3" for i in (1, 2, 3)
    ]
    again = set_up(house)
    assert (again.stdout, again.stderr, len(taken(house))) == (done.stdout, "", 3)


def test_a_machine_with_a_gpu_takes_the_newest_torch(house):
    script(house[0] / "nvidia-smi", 'echo "GPU 0: some name"\n')
    set_up(house)
    assert taken(house)[1] == "pip torch>=2.11"


def test_a_changed_pyproject_updates_the_environment_in_place(house):
    set_up(house)
    with (house[0] / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    assert set_up(house).returncode == 0
    assert [line.split()[0] for line in taken(house)] == ["venv", "pip", "pip", "pip", "pip"]


def test_an_unfinished_environment_is_rebuilt(house):
    root = house[0]
    (root / "fail").touch()
    done = set_up(house)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: installing torch==2.13.0 failed" in done.stderr
    (root / ".venv/half_a_package").touch()
    (root / "fail").unlink()
    assert set_up(house).returncode == 0
    assert not (root / ".venv/half_a_package").exists()
    assert taken(house).count("venv") == 2


def test_half_an_update_is_not_taken_for_good_when_pyproject_is_reverted(house):
    root = house[0]
    assert set_up(house).returncode == 0
    pyproject = root / "pyproject.toml"
    before = pyproject.read_text()
    pyproject.write_text(before + "\n# changed\n")
    (root / "fail").touch()
    assert set_up(house).returncode == 2
    (root / "fail").unlink()
    pyproject.write_text(before)
    (root / ".venv/half_a_package").touch()
    assert set_up(house).returncode == 0
    assert not (root / ".venv/half_a_package").exists()
    assert taken(house).count("venv") == 2


@pytest.mark.parametrize("doing", ["find", "mv"])
def test_killed_while_it_changes_something_nothing_half_is_taken_for_good(house, doing):
    root = house[0]
    assert set_up(house).returncode == 0
    stamp = (root / ".venv/stamp").read_text()
    (root / ".venv/half_a_package").touch()
    if doing == "find":  # a rebuild is what calls it
        (root / ".venv/unfinished").touch()
    with (root / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    really = f'{shutil.which("find")} "$@";' if doing == "find" else ""
    killer = script(root / doing, f'{really} kill -9 "$PPID"')
    assert set_up(house).returncode < 0
    assert (root / ".venv/unfinished").exists()
    Path(killer).unlink()
    done = set_up(house)
    assert (done.returncode, done.stdout) == (0, f"{root}/.venv/bin/python\n")
    assert not (root / ".venv/half_a_package").exists()
    assert (root / ".venv/stamp").read_text() != stamp
    assert set_up(house).stderr == ""


def test_the_lock_is_on_a_file_opened_for_writing_that_git_ignores(house):
    root = house[0]
    record = f'readlink "/proc/$$/fd/9" >{root}/locked; cat "/proc/$$/fdinfo/9" >>{root}/locked'
    script(root / "flock", f"$({record})")
    assert set_up(house).returncode == 0
    name, *facts = (root / "locked").read_text().splitlines()
    assert name == f"{root}/.venv.lock"
    (flags,) = [line.split()[1] for line in facts if line.startswith("flags")]
    assert int(flags, 8) & os.O_ACCMODE == os.O_WRONLY
    assert run("git", "check-ignore", "-q", ".venv.lock").returncode == 0


def test_a_second_caller_waits_and_installs_nothing_again(house):
    root, python, _ = house
    (root / "hold").touch()
    command = ["bash", str(root / "scripts/setup_env.sh")]
    env = os.environ | {"TITAN_PYTHON": python, "TITAN_NO_VENV": "0"}
    env["PATH"] = f"{root}:{os.environ['PATH']}"
    options = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as first:
        while "1/3" not in first.stderr.readline():
            pass
        with subprocess.Popen(command, **options) as second:
            assert "waiting for it" in second.stderr.readline()
            (root / "hold").unlink()
            out, err = second.communicate(timeout=60)
        assert first.communicate(timeout=60)[0] == out == f"{root}/.venv/bin/python\n"
    assert (first.returncode, second.returncode, err) == (0, 0, "")
    assert len(taken(house)) == 3


def test_an_old_python_is_refused_in_one_line(tmp_path):
    old = script(
        tmp_path / "python3.9",
        'case $1 in -V) echo "Python 3.9.2" ;; -c) exit 1 ;; esac\n',
    )
    done = run("scripts/setup_env.sh", TITAN_PYTHON=old)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: titan_vlm needs Python >= 3.11, but {old} is Python 3.9.2"
    )
    assert done.stderr.count("\n") == 1
    done = run("scripts/setup_env.sh", TITAN_PYTHON="no-such-python")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_python_without_the_packages_is_refused_in_one_line(house):
    root = house[0]
    text = (root / "pyproject.toml").read_text()
    (root / "pyproject.toml").write_text(text.replace('"numpy>=', '"no-such-package>=1", "numpy>='))
    done = set_up(house, TITAN_NO_VENV="1", TITAN_PYTHON=sys.executable)
    assert done.returncode == 2
    assert "lacks: " in done.stderr
    assert "no-such-package>=1" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_python_with_older_packages_is_refused_with_what_it_has(house):
    root = house[0]
    text = (root / "pyproject.toml").read_text()
    (root / "pyproject.toml").write_text(text.replace('"numpy>=2.0"', '"numpy>=99"'))
    done = set_up(house, TITAN_NO_VENV="1", TITAN_PYTHON=sys.executable)
    assert done.returncode == 2
    assert f"lacks: numpy>=99 (has {version('numpy')})\n" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("found", "code"), [("2.11.0a0+5f2.nv", 0), ("2.10.1", 2)])
def test_a_vendors_build_counts_as_the_release_it_is_of(house, found, code):
    """torch as its metadata gives it; packaging is not there, pip's copy is."""
    root = house[0]
    about = root / "site" / "torch-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {found}\n")
    (root / "site" / "packaging.py").write_text("raise ImportError")
    options = {"TITAN_NO_VENV": "1", "TITAN_PYTHON": sys.executable}
    done = set_up(house, PYTHONPATH=str(root / "site"), **options)
    assert done.returncode == code, done.stderr
    assert ("torch>=2.11 (has 2.10.1)" in done.stderr) == bool(code)


def test_an_environment_that_was_moved_is_installed_again(house, tmp_path_factory):
    set_up(house)
    moved = tmp_path_factory.mktemp("elsewhere") / "house"
    shutil.copytree(house[0], moved)
    assert set_up((moved, *house[1:])).returncode == 0
    assert taken(house)[3:] == ["pip torch==2.13.0", f"pip -e {moved}[dev]"]
