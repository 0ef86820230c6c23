"""What a run leaves about itself in `run.output_dir`, beside metrics and checkpoints.

    config.toml        the resolved configuration
    run.json           model, mesh, versions and commit of the newest start
    events.jsonl       what happened: `events.py`
    before<n>/         metrics and ledger of a run whose checkpoints are gone
    .lock              which process has it: `lock.py`
    logs/rank<r>.log   what logging, warnings and uncaught exceptions said on each rank

Rank 0 writes all but the others' logs.
"""

import json
import logging
import os
import platform
import subprocess
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_vlm import __version__, events, lock, logs
from titan_vlm.config import Config, config_to_toml
from titan_vlm.errors import ConfigError, UserError
from titan_vlm.training.curriculum import total_steps
from titan_vlm.training.ranks import Ranks

logger = logging.getLogger("titan_vlm")
HISTORY = ("metrics.jsonl", "moe.jsonl", "ledger")  # what a run cuts that begins at step 0
_is_ready = False  # all is set up, and nothing was refused
PACKAGES = ("torch", "torchdata", "transformers", "tokenizers", "torchao", "safetensors", "numpy")


def open_run_dir(output: Path, degrees: Mapping[str, int]) -> None:
    """Make and lock `run.output_dir`, begin its log and events, and let rank 0 speak for all."""
    global _is_ready
    rank, _is_ready = dist.get_rank(), False
    lock.release()
    try:
        (output / "logs").mkdir(parents=True, exist_ok=True)
        logs.begin(output / "logs" / f"rank{rank}.log", is_shown=rank == 0)
        if rank == 0:
            lock.take(output, "run.output_dir")
            events.open_for(output)
    except OSError as error:
        raise ConfigError(f"run.output_dir = {output}: {error.strerror}") from error
    where = {"host": platform.node(), "pid": os.getpid()}
    events.write("start", mesh=dict(degrees), ranks=dist.get_world_size(), **where)
    if restarts := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        events.write("restart", count=restarts)


def begin_anew(output: Path, ranks: Ranks, directory: str) -> None:
    """Where events tell of saves, but there is no checkpoint, which may be elsewhere: keep what the
    run has written so far. Every rank must call it, for nodes may have disks of their own."""
    if folder := ranks.on_first(lambda: _folder_for_history(output, directory)):
        (output / folder).mkdir(exist_ok=True)
        for name in HISTORY:
            with suppress(FileNotFoundError):  # or a rank with the same disk was sooner
                (output / name).rename(output / folder / name)
        ranks.any(False)  # a barrier: nobody may have begun new files before


def _folder_for_history(output: Path, directory: str) -> str | None:
    """A new folder in `output`, where there is something to keep."""
    saved = None
    for event in events.read(output):
        if event["kind"] in ("save", "anew"):
            saved = event["step"]
    if saved is None:
        return None
    number = 1
    while (output / f"before{number}").exists():
        number += 1
    folder = f"before{number}"
    (output / folder).mkdir()
    logger.warning(
        "events.jsonl tells of a save after step %s, but %s has no checkpoint: beginning anew, and "
        "keeping metrics and ledger so far in %s; if that is wrong, stop, set "
        "checkpoint.directory, and move them back",
        *(saved, directory, output / folder),
    )
    events.write("anew", kept_in=folder)
    return folder


def describe(output: Path, config: Config, degrees: Mapping[str, int]) -> None:
    """Leave the resolved configuration and `run.json` with the run, which is set up."""
    global _is_ready
    _is_ready = True
    if dist.get_rank() != 0:
        return
    about = {
        "model": config.model.name,
        "flavor": config.model.flavor,
        "steps": total_steps(config),
        "mesh": dict(degrees),
        "ranks": dist.get_world_size(),
        "versions": _versions(),
        "git": git_commit(Path(__file__).parent),
    }
    try:
        (output / "config.toml").write_text(config_to_toml(config))
        temporary = output / ".run.json"
        temporary.write_text(json.dumps(about, indent=2) + "\n")
        temporary.rename(output / "run.json")
    except OSError as error:
        raise ConfigError(f"run.output_dir = {output}: {error.strerror}") from error


@contextmanager
def told() -> Iterator[None]:
    """Around a run: an exception that ends it goes into its log and its events, which end here.
    Of a user's error the log has the line that the console has."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        line = " ".join(f"{type(error).__name__}: {error}".split())
        is_users = isinstance(error, UserError)
        reason = "refused" if is_users and not _is_ready else "error"
        events.write("stop", reason=reason, error=line[:500])
        text = line if is_users else "".join(traceback.format_exception(error)).rstrip()
        logs.write(logging.ERROR, text)
        if is_users:
            lock.release()
        raise  # else with the lock, for a thread may still be saving: it goes with the process
    else:
        lock.release()
    finally:
        events.close()
        logs.end()


# ---------------------------------------------------------------------------- run.json


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"titan_vlm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda}


def git_commit(folder: Path) -> dict[str, Any] | None:
    """The commit that the program in `folder` is of, and whether its files differ from it (dirty);
    None where it is not in a repository, or git is not there."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.strip()

    try:
        if not git("ls-files"):  # installed below somebody else's repository
            return None
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None
