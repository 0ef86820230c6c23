"""manifest.json: what a checkpoint is, and size and SHA-256 of every file in it.

    {"format": 1, "step": 100, "saved_at": "2025-01-31T12:00:00+00:00",
     "files": {"__0_0.distcp": {"bytes": 123, "sha256": "..."}, ".metadata": {...}},
     "versions": {"torch": "2.13.0", ...}, "resume": "auto", "mesh": {"dp_shard": 4, ...},
     "config": "[run]...", "sha256": "of all this without this line"}

It is the last file that is written; a folder without one is no checkpoint.
"""

import hashlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

from titan_vlm import __version__
from titan_vlm.training.storage import Storage

NAME = "manifest.json"
FORMAT = 1
PAUSES_S = (1.0, 4.0)  # between attempts to read


def make(step: int, files: dict[str, dict[str, Any]], about: dict[str, Any]) -> bytes:
    """The text of a manifest; `about` says where the checkpoint comes from."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"format": FORMAT, "step": step, "saved_at": now, "files": files}
    content |= {"versions": {"titan_vlm": __version__, "torch": torch.__version__}} | about
    return json.dumps(content | {"sha256": _digest(content)}, indent=1).encode()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(storage: Storage, name: str) -> dict[str, Any]:
    """The manifest of the checkpoint `name`.

    Raises:
        ValueError: it is none.
        OSError: it cannot be read.
    """
    content = json.loads(storage.read(name, NAME))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected a JSON object with format {FORMAT}")
    if content.pop("sha256", None) != _digest(content):
        raise ValueError("it is not as it was written")
    for file, facts in content["files"].items():
        if "/" in file or not isinstance(facts["bytes"], int) or len(facts["sha256"]) != 64:
            raise ValueError(f'"{file}" is no entry of a file')
    return content


def problems(
    storage: Storage, name: str, checksums: bool = True, turn: int = 0, turns: int = 1
) -> list[str]:
    """What is wrong with a checkpoint; nothing where it is whole.

    Args:
        checksums: read every file; else look at the sizes alone.
        turn, turns: look at every `turns`-th file only, from `turn` on: the others are other
            ranks'.
    """
    try:
        files = _patiently(lambda: read(storage, name))["files"]
    except FileNotFoundError:
        return [f"{NAME} is missing"]
    except Exception as error:  # of whatever kind: object stores have their own
        return [f"{NAME}: {type(error).__name__}: {error}"]
    mine = {file: files[file] for file in sorted(files)[turn::turns]}
    return differences(storage, name, mine, checksums)


def differences(storage: Storage, name: str, files: dict, checksums: bool) -> list[str]:
    """Which files in a folder are not as they were written; `files` as in a manifest."""
    found = []
    for file in files:
        try:
            found += _patiently(lambda file=file: _differs(storage, name, file, files, checksums))
        except FileNotFoundError:
            found.append(f"{file} is missing")
        except Exception as error:
            found.append(f"{file}: {getattr(error, 'strerror', None) or error}")
    return found


def _differs(storage: Storage, name: str, file: str, files: dict, checksums: bool) -> list[str]:
    size, expected = storage.size(name, file), files[file]["bytes"]
    if size != expected:
        return [f"{file} has {size} bytes instead of {expected}"]
    if checksums and storage.sha256(name, file) != files[file]["sha256"]:
        return [f"{file} has another checksum than when it was written"]
    return []


def _patiently(action: Callable[[], Any]) -> Any:
    """Try again what a network file system refuses now and then: a good checkpoint must not be
    set aside for that."""
    for pause_s in PAUSES_S:
        try:
            return action()
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            raise  # it would be so again
        except Exception:
            time.sleep(pause_s)
    return action()
