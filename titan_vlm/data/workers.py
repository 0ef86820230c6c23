"""What signals mean to a data loader's worker process."""

import os
import signal
import threading


def shield(_: int = 0) -> None:
    """Let signals sent to all processes of a run pass, for a rank needs its workers to finish its
    step. The rank ends them itself; when it is killed, they notice within seconds."""
    signal.set_wakeup_fd(-1)  # inherited: the rank would take our signals for its own
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_only_the_rank, name="signals", daemon=True).start()


def _obey_only_the_rank() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
