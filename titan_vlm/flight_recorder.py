"""What PyTorch recorded about this rank's collectives: read, and written for `torchfrtrace`.

PyTorch keeps the newest 2,000 collectives of gloo, and in a recorder of its own those of NCCL. An
entry says which group and operation, when it was called and whether it has ended.
"""

import faulthandler
import io
import os
import pickle
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed.distributed_c10d import _world

NCCL_DUMP_S = 15.0  # what NCCL's watchdog itself allows for a dump


def nccl_environment(directory: Path) -> dict[str, str]:
    """What has NCCL's watchdog dump its recorder into `directory`."""
    prefix = f"{directory.resolve()}/nccl_rank_"
    return {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        # The second name is the older one; whoever has set it means both.
        "TORCH_FR_DUMP_TEMP_FILE": os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", prefix),
    }


def make_room(directory: Path) -> None:
    """Where NCCL is used: make the directory, which NCCL would not, and remove an older dump."""
    if uses_nccl():
        with suppress(OSError):  # the trainer says what is wrong with output_dir
            directory.mkdir(parents=True, exist_ok=True)
            nccl_file().unlink(missing_ok=True)


def uses_nccl() -> bool:
    return "nccl" in dist.get_backend_config()


def nccl_file() -> Path:
    return Path(f"{os.environ['TORCH_FR_DUMP_TEMP_FILE']}{dist.get_rank()}")


def nccl_entries() -> list[dict]:
    """The collectives in NCCL's dump, oldest first; none where there is no dump in time.

    The dump is left to NCCL's watchdog, which does it once a rank has asked for it: it may hang,
    as anything that asks CUDA.
    """
    end = time.monotonic() + NCCL_DUMP_S
    while uses_nccl() and time.monotonic() < end:
        with suppress(OSError, EOFError, pickle.UnpicklingError):  # not there, or not whole yet
            return PlainUnpickler(io.BytesIO(nccl_file().read_bytes())).load()["entries"]
        time.sleep(0.2)
    return []


class PlainUnpickler(pickle.Unpickler):
    """Dictionaries, lists, texts and numbers, as PyTorch's recorder writes them: the file may be
    anybody's, and a pickle that names a class or function can run anything."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"{module}.{name}: only plain values are read")


def gloo_dump() -> dict:
    """Gloo's record; its "entries" are the collectives, oldest first."""
    dump = pickle.loads(_distributed_c10d._dump_fr_trace())
    # Gloo does not record who is in a group, and torchfrtrace does not work without.
    dump["pg_config"] = {
        group.group_name: {
            "name": group.group_name,
            "desc": group.group_desc,
            "ranks": str(dist.get_process_group_ranks(group)),
        }
        for group in list(_world.pg_map)  # the main thread may be making one
    }
    return dump


def write(directory: Path, dump: dict, error: BaseException | None) -> str:
    """Write gloo's record, and the stacks of all threads after the one that `error` came through.

    Returns:
        The directory, or why nothing could be written.
    """
    rank = dist.get_rank()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"gloo_rank_{rank}").write_bytes(pickle.dumps(dump))
        with open(directory / f"stacks_rank_{rank}.txt", "w") as file:
            file.writelines(traceback.format_exception(error) if error else [])
            file.flush()
            faulthandler.dump_traceback(file)
    except OSError as reason:
        return str(reason)
    return str(directory)


def is_running(entry: dict) -> bool:
    """Whether the collective of an entry has not ended."""
    return not entry["retired"] and entry["state"] != "completed"
