"""A rank of four that dies, and one that hangs: noticed in time, started again, nothing lost."""

import os
import signal
import time

import pytest

from tests.distributed.test_stop import children, end, start, wait_for
from tests.small_run import curve, run, words
from titan_vlm import events
from titan_vlm.data.ledger import read_ledger

TIMEOUT_S = 20
CHANGES = {
    "training__global_batch_size": "4",
    "training__steps": "30",
    "checkpoint__every": "2",
    "checkpoint__async_save": "true",
    "checkpoint__export_hf": "false",
    "comm__timeout_s": str(TIMEOUT_S),
    "data__ledger": "true",
    "parallelism__ep": "2",
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_of_four_is_lost_and_the_run_goes_on(tmp_path, world, number):
    output = tmp_path / "run"
    script = start(words(output, CHANGES), {"NGPU": "4", "MAX_RESTARTS": "2"})
    try:
        wait_for(lambda: [e for e in events.read(output) if e["kind"] == "save"], script)
        victim = children(script.pid)[3]
        os.kill(victim, number)
        since = time.monotonic()
        wait_for(lambda: restarts(output), script, seconds=300)
        noticed = time.monotonic() - since
        _, said = script.communicate(timeout=300)
    finally:
        end(script)
    assert script.returncode == 0, said
    # torchrun's grace for the others, the start of four processes and its own polling besides.
    assert noticed < TIMEOUT_S + 90
    (again,) = restarts(output)
    assert again["count"] == 1
    resumed = [event for event in events.read(output) if event["kind"] == "resume"]
    assert resumed[-1]["step"] >= 2
    assert world.run(4, run_here, tmp_path / "whole") == [0] * 4
    assert [step for step, *_ in curve(output)] == list(range(1, 31))
    assert curve(output) == curve(tmp_path / "whole")
    ledger = read_ledger(output)
    assert ledger == read_ledger(tmp_path / "whole")
    ids = [id for step in ledger.values() for row in step.rows for id in row]
    assert len(ids) == len(set(ids))


def restarts(output):
    return [event for event in events.read(output) if event["kind"] == "restart"]


def run_here(output):
    return run(output, **CHANGES)
