"""Which runs are below a directory, how far they are, how they ended, what can be resumed from.

    scripts/runs.py runs                 a line for each run and each of its checkpoints
    scripts/runs.py runs --verify        also reads every checkpoint whole and compares checksums
    scripts/runs.py runs --json          the same for programs

    run    model               steps     mesh         loss  state                restarts
    demo   qwen3_vl debug_moe  120/1500  dp_shard 2  3.412  stopped by SIGUSR1          1
             step 100   38.9 MB  valid
             step 120   38.9 MB  damaged: train.pt: missing

A run "running?" has not said that it ended and either its process is there (on this machine) or it
wrote something within the last minutes. Exit status: 1 where a checkpoint is damaged, 2 where there
is nothing to list.
"""

import argparse
import json
import os
import platform
import re
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from titan_vlm import events
from titan_vlm.training import manifest
from titan_vlm.training.storage import Storage

RECENT_S = 900
TAIL_BYTES = 1 << 16  # of metrics.jsonl: the newest record is in there
FOLDER = re.compile(r"step-(\d+)(\..+)?")
SIGNS = ("run.json", events.NAME, "config.toml", "metrics.jsonl")


def main(argv: list[str]) -> int:
    args = parse(argv)
    if not args.directory.is_dir():
        print(f"error: {args.directory}: no such directory", file=sys.stderr)
        return 2
    runs = [look(folder, args.directory, args.verify) for folder in find(args.directory)]
    if args.json:
        print(json.dumps(runs, indent=2))
    elif not runs:
        print(f"error: {args.directory}: no run in it or below", file=sys.stderr)
        return 2
    else:
        print("\n".join(table(runs)))
    damaged = any(checkpoint["problems"] for run in runs for checkpoint in run["checkpoints"])
    return int(damaged)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="runs.py", description="Runs, their ends and checkpoints")
    parser.add_argument("directory", type=Path, help="a run's output_dir, or what is above several")
    parser.add_argument("--verify", action="store_true", help="compare checksums, not only sizes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def find(directory: Path) -> list[Path]:
    """The directories of runs; a run's own folders are not searched."""
    found = []
    for folder, below, files in os.walk(directory):
        if any(sign in files for sign in SIGNS):
            found.append(Path(folder))
            below.clear()
        below.sort()
    return found


# ---------------------------------------------------------------------------- one run


def look(folder: Path, above: Path, verify: bool) -> dict[str, Any]:
    """Everything that is told about the run in `folder`."""
    about = read_about(folder)
    told = events.read(folder)
    starts = [i for i, event in enumerate(told) if event["kind"] == "start"]
    refused = sum(event.get("reason") == "refused" for event in told if event["kind"] == "stop")
    last = last_metrics(folder)
    step = max(last.get("step", 0), max((event.get("step") or 0 for event in told[-1:]), default=0))
    return {
        "name": str(folder.relative_to(above)) if folder != above else folder.resolve().name,
        "model": about.get("model", ""),
        "flavor": about.get("flavor", ""),
        "step": step,
        "steps": about.get("steps"),
        "mesh": {axis: n for axis, n in about.get("mesh", {}).items() if n > 1},
        "loss": last.get("loss"),
        "state": state_of(folder, told[starts[-1] :] if starts else []),
        "restarts": max(len(starts) - refused - 1, 0),
        "checkpoints": checkpoints(where_checkpoints_lie(folder), verify),
    }


def read_about(folder: Path) -> dict[str, Any]:
    """run.json; of a run that has none, what its configuration says."""
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        pass  # older than run.json, or refused before it was written
    try:
        config = tomllib.loads((folder / "config.toml").read_text())
    except (OSError, ValueError):
        return {}
    model, training = config.get("model", {}), config.get("training", {})
    return {
        "model": model.get("name", ""),
        "flavor": model.get("flavor", ""),
        "steps": training.get("steps"),
    }


def last_metrics(folder: Path) -> dict[str, Any]:
    """The newest record with a loss."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # cut by the seek, or half written
            continue
        if "loss" in record:
            return record
    return {}


def state_of(folder: Path, told: list[dict[str, Any]]) -> str:
    """How the newest process of a run ended, from its events; or whether it seems to run."""
    stops = [event for event in told if event["kind"] == "stop"]
    if stops:
        stop = stops[-1]
        reason = stop.get("reason", "")
        if reason == "signal":
            return f"stopped by {stop.get('signal', 'a signal')}"
        return {
            "finished": "finished",
            "max_hours": "stopped by training.max_hours",
            "error": f"error: {stop.get('error', '')}",
            "refused": f"last start refused: {stop.get('error', '')}",
        }.get(reason, reason)
    return "running?" if told and seems_alive(folder, told[0]) else "unknown (killed)"


def seems_alive(folder: Path, start: dict[str, Any]) -> bool:
    if start.get("host") == platform.node():
        try:
            os.kill(start["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody else's
            return True
        return True
    files = [folder / events.NAME, folder / "metrics.jsonl", *(folder / "logs").glob("*.log")]
    newest = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    return time.time() - newest < RECENT_S


def where_checkpoints_lie(folder: Path) -> str:
    """`checkpoint.directory` of the run, or the folder in its own."""
    try:
        config = tomllib.loads((folder / "config.toml").read_text())
    except (OSError, ValueError):
        config = {}
    return config.get("checkpoint", {}).get("directory") or str(folder / "checkpoints")


def checkpoints(directory: str, verify: bool) -> list[dict[str, Any]]:
    """Oldest first; of unfinished ones there is nothing to check."""
    storage, found = Storage(directory), []
    for folder in storage.names():
        if name := FOLDER.fullmatch(folder):
            files = storage.names(folder)
            # An object store has a save that is being written under its name already.
            complete = name[2] is None and (storage.is_local or manifest.NAME in files)
            found.append(
                {
                    "step": int(name[1]),
                    "folder": folder,
                    "bytes": sum(storage.size(folder, file) for file in files),
                    "complete": complete,
                    "problems": manifest.problems(storage, folder, verify) if complete else [],
                }
            )
    return sorted(found, key=lambda checkpoint: (checkpoint["step"], checkpoint["folder"]))


# ---------------------------------------------------------------------------- as a table


def table(runs: list[dict[str, Any]]) -> list[str]:
    head = ("run", "model", "steps", "mesh", "loss", "state", "restarts")
    rows = [
        (
            run["name"],
            f"{run['model']} {run['flavor']}".strip(),
            f"{run['step']}/{'?' if run['steps'] is None else run['steps']}",
            " x ".join(f"{axis} {n}" for axis, n in run["mesh"].items()) or "1",
            "" if run["loss"] is None else f"{run['loss']:.4f}",
            run["state"] if len(run["state"]) <= 60 else f"{run['state'][:57]}...",
            str(run["restarts"]),
        )
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(f"{x:<{width}}" for x, width in zip(row, widths, strict=True)).rstrip()

    lines = [line(head)]
    for run, row in zip(runs, rows, strict=True):
        lines.append(line(row))
        lines += [
            f"    step {c['step']:>8,}  {c['bytes'] / 1e6:>12,.1f} MB  {condition(c)}"
            for c in run["checkpoints"]
        ]
    return lines


def condition(checkpoint: dict[str, Any]) -> str:
    if not checkpoint["complete"]:
        return f"incomplete ({checkpoint['folder']})"
    problems = checkpoint["problems"]
    more = f" and {len(problems) - 1} more" if problems[1:] else ""
    return f"damaged: {problems[0]}{more}" if problems else "valid"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
