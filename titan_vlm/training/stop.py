"""Ends a run before its last step: a signal, or `training.max_hours`.

    SIGTERM, SIGUSR1, SIGINT     this rank wishes to stop
    before every step            the ranks agree, for a signal may reach one of them only
    agreed                       save, exit with status 75: the same command goes on from here
    a second signal              exit at once, status 128 + signal

Python runs a signal's handler in the main thread, between two of its instructions: not while that
thread waits in a collective. So the handlers do nothing. Python's C code also writes the signal's
number into a pipe, wherever the main thread is, and a thread here reads it.
"""

import os
import signal
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from titan_vlm import distributed, events, launched

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
MAX_HOURS = 1  # a wish beside the signals' numbers; it is SIGHUP's, which is none of them


class Stop:
    """`with Stop(config.training.max_hours) as stop:` around training, in the main thread; in any
    other it leaves the signals to whoever has that one."""

    def __init__(self, max_hours: float = 0.0):
        self.max_hours = max_hours
        self.reason = ""  # once agreed: a signal's name, or "max_hours"
        self._began = launched.began()
        self._signal = 0
        self._at = 0.0  # of the signal
        self._steps = -1  # done; before training -1
        self._previous: dict[int, Any] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._thread.start()
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGINT:
                    self._previous[number] = signal.signal(number, lambda *_: None)
                    # A system call of a C++ library goes on instead of failing with EINTR.
                    signal.siginterrupt(number, False)
        launched.end_with_launcher()
        if sent := launched.begin():  # and never 0: a signal may have come here meanwhile
            self._signal = sent
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._thread:
            signal.set_wakeup_fd(self._wakeup_fd)
            os.write(self._pipe[1], b"\0")
            self._thread.join()
            for end in self._pipe:
                os.close(end)

    def agreed(self, steps: int) -> bool:
        """Whether all ranks stop now, after `steps` steps; every rank calls it at the same places.

        Costs an all-reduce of 8 bytes between all ranks, on the host, whatever the device.
        """
        is_first, self._steps = self._steps < 0, steps
        wish = self._signal
        hours = (time.time() - self._began) / 3600
        # Not before the first step: a limit that is too short must not queue a run for ever.
        if not wish and 0 < self.max_hours < hours and not is_first:
            wish = MAX_HOURS
        if dist.is_initialized() and dist.get_world_size() > 1:
            wishes = torch.tensor(wish, device="cpu")
            dist.all_reduce(wishes, dist.ReduceOp.MAX)
            wish = int(wishes)
        if wish and not self.reason:
            self.reason = "max_hours" if wish == MAX_HOURS else signal.Signals(wish).name
            if wish != MAX_HOURS:
                events.write("signal", step=steps, signal=self.reason)
        return bool(wish)

    def outcome(self) -> dict[str, str]:
        """What the event `stop` of a run that did not fail says."""
        if self.reason in ("", "max_hours"):
            return {"reason": self.reason or "finished"}
        return {"reason": "signal", "signal": self.reason}

    def _listen(self) -> None:
        """What the thread does."""
        while number := os.read(self._pipe[0], 1)[0]:
            if number in SIGNALS:  # those of others, such as SIGCHLD, come here too
                self._receive(signal.Signals(number))

    def _receive(self, number: signal.Signals) -> None:
        # Half, for the launcher's second signal must never fall into it.
        if self._signal and time.monotonic() - self._at < launched.REPEAT_S / 2:
            return
        if self._signal:
            _say(f"{number.name} again: exiting at once, without saving")
            events.write("stop", step=self._steps, reason="signal", signal=number.name, saved=False)
            sys.stdout.flush()
            os._exit(128 + number)
        if number == signal.SIGTERM and launched.has_failed_peer():
            events.write("stop", step=self._steps, reason="error", error="another rank failed")
            os._exit(128 + number)
        self._at = time.monotonic()
        self._signal = number
        doing = f"finishing step {self._steps + 1}, then saving"
        if self._steps < 0:
            doing = "ending as soon as all is set up"
        _say(f"{number.name}: {doing}; once more to exit at once")


def _say(text: str) -> None:
    if not distributed.is_hidden_rank():
        print(text, file=sys.stderr, flush=True)
