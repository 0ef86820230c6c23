"""torchrun that ends as its first failed worker did, in one line instead of a report.

Takes torchrun's own arguments and runs torchrun's own main. A worker's stderr already says what
went wrong, so torchrun's traceback about its child only buries it. Here the launcher exits with
that worker's code (2: the user's mistake, said in one line; 128 + n: killed by signal n) and speaks
only where the reason was not seen: another rank than those shown failed, or a signal ended it.

Signals go through here too (`titan_vlm/launched.py`): SIGTERM, SIGUSR1, SIGINT and SIGHUP have the
trainers save and end, for which they have STOP_GRACE_S seconds, and then the status is 75.
"""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main, parse_args

from titan_vlm.launched import STOPPED, Workers

USER_ERROR = 2
GRACE_S = 1800


def launch(argv: list[str]) -> int:
    # Says "failed (exitcode: 2) local_rank: 0 ..." for what `explain` says once and better.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # Else a restart meets in the store of those that failed, and reads their addresses.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    workers = Workers(grace_s=int(os.environ.get("STOP_GRACE_S", GRACE_S)))
    try:
        with workers:
            main(["--signals-to-handle", "SIGQUIT", *argv])  # its own way with the others is off
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        explain(rank, failure, parse_args(argv).local_ranks_filter)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stop:
        number = signal.Signals(workers.signal or stop.sigval)
        print(f"stopped by {number.name}", file=sys.stderr)
        return STOPPED if workers.stopped else 128 + number
    return STOPPED if workers.stopped else 0


def explain(rank: int, failure: ProcessFailure, shown_ranks: str) -> None:
    """One line about the failed worker, and its traceback where it recorded one unseen."""
    was_shown = str(failure.local_rank) in shown_ranks.split(",")
    if was_shown and failure.exitcode > 0:
        return
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (often: out of memory)" if name == "SIGKILL" else ""
        print(f"error: rank {rank} was killed by {name}{hint}", file=sys.stderr)
        return
    if isinstance(failure.message, dict):
        print(failure.message["extraInfo"]["py_callstack"], file=sys.stderr)
    kind = "refused its input" if failure.exitcode == USER_ERROR else "failed"
    print(
        f"error: rank {rank} {kind} (exit code {failure.exitcode}); "
        f"LOG_RANK={failure.local_rank} shows its output",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
