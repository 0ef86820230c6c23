"""The ledger: what each step consumed, whoever read it and however often it broke off."""

import json
from unittest.mock import patch

import pytest
import torch

from tests.small_run import curve, run, run_killed
from tests.unit.test_data_mixture import talks
from titan_vlm import events
from titan_vlm.data.ledger import Ledger, name_samples, read_ledger, sample_ids
from titan_vlm.data.mixture import Member, Mixture
from titan_vlm.data.packing import Counts
from titan_vlm.data.rows import Row
from titan_vlm.errors import DataError
from titan_vlm.training.by_source import BySource


def row(*ids, skipped=()):
    origins = [f"{id}.jsonl" for id in ids]
    empty = [None] * 5
    rest = {"grids": [], "visual_index_M": None, "sources": [], "images_of": []}
    made = Row(
        *empty[:4], doc_lens=[], pixels_NC=None, sample_ids=list(ids), origins=origins, **rest
    )
    made.skipped = list(skipped)
    return made


def write(folder, readers, first, last, after=0):
    """Steps first..last of two rows a reader; row i of step s is named s.i."""
    ledgers = [Ledger(folder, reader, readers, after) for reader in range(readers)]
    for step in range(first, last + 1):
        for reader, ledger in enumerate(ledgers):
            ledger.write(step, [row(f"{step}.{i}") for i in range(reader, 4, readers)])
    for ledger in ledgers:
        ledger.close()


def in_order(steps):
    return {step: [[f"{step}.{i}"] for i in range(4)] for step in steps}


def rows_of(folder):
    return {step: read.rows for step, read in read_ledger(folder).items()}


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_rows_of_all_readers_come_back_in_the_order_of_the_run(tmp_path, readers):
    write(tmp_path, readers, 1, 5)
    assert rows_of(tmp_path) == in_order(range(1, 6))


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 1), (1, 1)])
def test_steps_that_run_again_replace_those_of_the_run_that_was_killed(tmp_path, before, after):
    write(tmp_path, before, 1, 7)
    write(tmp_path, after, 5, 6, after=4)
    assert rows_of(tmp_path) == in_order(range(1, 7))
    # Reader 3 of the first part has nothing left of steps 5 to 7.
    lines = [path.read_text() for path in (tmp_path / "ledger").iterdir()]
    assert not any('"step": 7' in text for text in lines)


def test_a_line_that_was_being_written_and_a_step_without_all_readers_do_not_count(tmp_path):
    write(tmp_path, 2, 1, 3)
    path = tmp_path / "ledger" / "reader1.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-9])
    assert rows_of(tmp_path) == in_order([1, 2])
    write(tmp_path, 2, 3, 4, after=2)
    assert rows_of(tmp_path) == in_order(range(1, 5))


def test_a_file_that_nobody_shortened_counts_as_it_was_written_last(tmp_path):
    write(tmp_path, 1, 1, 5)
    path = tmp_path / "ledger" / "reader0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    again = [line.replace('"3.', '"again 3.') for line in lines[2:4]]
    path.write_text("".join(lines + again))
    assert list(read_ledger(tmp_path)) == [1, 2, 3, 4]
    assert read_ledger(tmp_path)[3].rows[0] == ["again 3.0"]


def test_what_was_left_out_is_in_the_ledger_and_ids_are_named_with_their_file(tmp_path):
    rows = [row("a:0:1", "b:0:2", skipped=["a:0:7"]), row("a:0:3")]
    assert sample_ids(rows) == [["a:0:1", "b:0:2"], ["a:0:3"]]
    assert name_samples(rows)[2] == "a:0:3 (a:0:3.jsonl)"
    Ledger(tmp_path, 0, 1, 0).write(1, rows)
    assert read_ledger(tmp_path)[1].skipped == ["a:0:7"]


def test_a_ledger_that_begins_later_is_read_and_one_with_a_hole_is_refused(tmp_path):
    write(tmp_path, 1, 4, 5)
    assert list(read_ledger(tmp_path)) == [4, 5]
    write(tmp_path, 1, 8, 8, after=5)
    with pytest.raises(DataError, match="the ledger has step 5 and then step 8; the run was wit"):
        read_ledger(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(DataError, match="no ledger/reader0.jsonl; set data.ledger = true"):
        read_ledger(tmp_path)
    write(tmp_path, 2, 1, 2)
    stale = (tmp_path / "ledger" / "reader1.jsonl").read_text()
    write(tmp_path, 1, 2, 2, after=1)
    (tmp_path / "ledger" / "reader1.jsonl").write_text(stale)  # of a disk that reader 0 cannot see
    with pytest.raises(DataError, match=r"step 2 .* of readers 0, 1, written for \[1, 2\] of them"):
        read_ledger(tmp_path)
    (tmp_path / "ledger" / "reader1.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="reader1.jsonl:1: expected a line of the ledger, got {"):
        read_ledger(tmp_path)


# ---------------------------------------------------------------------------- whole runs


@pytest.fixture
def mixed(tmp_path):
    """Settings of a run on two sources, one of which has a sample that cannot be used."""
    a, b = talks(tmp_path, "a", 23), talks(tmp_path, "b", 6)
    with open(b, "a") as file:
        file.write("{\n")
    tables = [
        f'{{name = "a", source = "openai", path = "{a}", weight = 2}}',
        f'{{name = "b", source = "openai", path = "{b}", weight = 1}}',
    ]
    return {
        "data__sources": f"[{', '.join(tables)}]",
        "data__ledger": "true",
        "data__max_bad_fraction": "1",
        "training__global_batch_size": "4",
        "training__dtype": "float64",
        "training__steps": "9",
        "checkpoint__every": "3",
        "checkpoint__export_hf": "false",
    }


def part(output, end, settings):
    """A run, killed after step `end`."""
    if end is None:
        assert run(output, **settings) == 0
    else:
        run_killed(output, end, **settings)


def source_figures(output):
    """By step, what the metrics say of the sources."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    return {
        record["step"]: {k: x for k, x in record.items() if k.startswith("source/")}
        for record in records
    }


@pytest.mark.slow
def test_killed_and_resumed_on_other_meshes_ledger_and_figures_are_those_of_one_process(
    world, tmp_path, mixed
):
    run(tmp_path / "whole", **mixed)
    ledger = read_ledger(tmp_path / "whole")
    assert list(ledger) == list(range(1, 10))
    used = [id for step in ledger.values() for row in step.rows for id in row]
    left_out = [id for step in ledger.values() for id in step.skipped]
    assert len(set(used + left_out)) == len(used + left_out)
    assert left_out and set(left_out) <= {f"b:{epoch}:6" for epoch in range(99)}

    here = tmp_path / "parts"
    world.run(2, part, here, 5, mixed)  # steps 4 and 5 come after its last checkpoint
    world.run(4, part, here, 7, mixed | {"parallelism__pp": "2"})  # two readers, of two ranks each
    world.run(2, part, here, None, mixed | {"parallelism__tp": "2"})  # one reader, of two ranks
    assert read_ledger(here) == ledger
    files = {path.name: path.read_text() for path in (here / "ledger").iterdir()}
    assert [files[f"reader{k}.jsonl"].count("\n") for k in (0, 1)] == [9, 6]
    assert len(files) == 2

    whole, again = source_figures(tmp_path / "whole"), source_figures(here)
    assert whole.keys() == again.keys()
    for step, figures in whole.items():
        assert again[step] == pytest.approx(figures, rel=1e-9)
    last = whole[9]
    assert last["source/a/samples"] + last["source/b/samples"] == len(used)
    assert last["source/b/bad"] == len(left_out) and last["source/a/bad"] == 0


def test_losses_of_sources_are_their_shares_of_the_loss(tmp_path, mixed):
    run(tmp_path, **mixed | {"metrics__log_every": "2", "training__steps": "4"})
    figures = source_figures(tmp_path)
    assert list(figures) == [2, 4]
    losses = {step: loss for step, loss, _ in curve(tmp_path)}
    for step, found in figures.items():
        ends = sorted([found["source/a/loss"], found["source/b/loss"]])
        assert ends[0] < losses[step] < ends[1]


def test_a_run_whose_epochs_are_read_ends_saved_and_goes_on_with_more(tmp_path, mixed, capfd):
    epochs = {"data__sources": mixed["data__sources"].replace("weight", "epochs = 1, weight")}
    mixed["checkpoint__every"] = "0"
    assert run(tmp_path, **mixed | epochs | {"training__steps": "99"}) == 2
    error = next(x for x in capfd.readouterr().err.splitlines() if x.startswith("error"))
    step = curve(tmp_path)[-1][0]
    assert error.startswith(
        f"error: after step {step} every source is through its epochs (a 1 x 23, b 1 x 7 samples); "
    )
    assert error.endswith(f"or end the run (or its stage) there: training.steps = {step}")
    assert (tmp_path / "checkpoints" / f"step-{step:06d}").exists()
    used = [i for s in read_ledger(tmp_path).values() for r in s.rows for i in r]
    assert sorted(used) == sorted([f"a:0:{k}" for k in range(23)] + [f"b:0:{k}" for k in range(6)])
    assert run(tmp_path, **mixed | epochs | {"training__steps": str(step)}) == 0  # is complete
    more = {"data__sources": epochs["data__sources"].replace("epochs = 1", "epochs = 2")}
    assert run(tmp_path, **mixed | more | {"training__steps": str(step + 2)}) == 0
    steps = read_ledger(tmp_path)
    later = [i for s in (step + 1, step + 2) for r in steps[s].rows for i in r]
    assert later and all(id.split(":")[1] == "1" for id in later)


def test_a_source_that_is_read_to_its_end_is_told_once(tmp_path, mixed):
    sources = mixed["data__sources"].replace('"b"', '"b", epochs = 4')
    settings = mixed | {"data__sources": sources}
    assert run(tmp_path, **settings | {"training__steps": "9"}) == 0
    (told,) = [event for event in events.read(tmp_path) if event["kind"] == "source_end"]
    assert told["source"] == "b" and 1 < told["step"] < 9
    log = (tmp_path / "logs" / "rank0.log").read_text()
    said = (
        f"step {told['step']}: source b is read to its end (4 x 7 samples); its share goes to the"
    )
    assert log.count("read to its end") == 1 and said in log
    assert run(tmp_path, **settings | {"training__steps": "12"}) == 0  # it was told before
    assert [event["kind"] for event in events.read(tmp_path)].count("source_end") == 1
    run(tmp_path / "again", **settings | {"training__steps": str(told["step"])})  # in that step
    assert "source_end" in [event["kind"] for event in events.read(tmp_path / "again")]


def test_the_end_of_a_source_is_told_with_its_step_once_and_whether_others_are_left(caplog):
    members = [Member("a", range(10), epochs=1), Member("b", range(4), epochs=2)]
    sources = BySource(Mixture(members), torch.device("cpu"))

    def told(step, a, b):
        caplog.clear()
        with caplog.at_level("INFO", "titan_vlm"):
            sources.set_counts(step, [*Counts(seen=a).as_list(), *Counts(seen=b).as_list()])
        return [record.getMessage() for record in caplog.records]

    assert told(1, 9, 7) == []
    gone = "step 2: source b is read to its end (2 x 4 samples); its share goes to the others"
    assert told(2, 9, 8) == [gone]
    assert told(3, 10, 8) == ["step 3: source a is read to its end (1 x 10 samples); none is left"]
    sources.counts = [Counts(seen=9), Counts(seen=7)]  # rolled back
    assert told(2, 10, 8) == []
    sources = BySource(Mixture([Member("a", range(10), limit=4), members[1]]), torch.device("cpu"))
    gone = "step 5: source a is read to its end (4 samples); its share goes to the others"
    assert told(5, 4, 7) == [gone]


def test_a_name_that_no_new_run_may_have_does_not_stop_one_that_has_it(tmp_path, mixed, capfd):
    odd = mixed | {"data__sources": mixed["data__sources"].replace('"b"', '"b/c"')}
    assert run(tmp_path / "new", **odd) == 2
    said = 'data.sources[1].name: expected a name without ":" and "/" for a new run, got "b/c"'
    assert f"error: {said}\n" in capfd.readouterr().err
    with patch("titan_vlm.train.check_new"):  # as when there was no such rule
        assert run(tmp_path / "old", **odd | {"training__steps": "3"}) == 0
    assert run(tmp_path / "old", **odd | {"training__steps": "4"}) == 0
    assert len(read_ledger(tmp_path / "old")) == 4


def test_without_the_setting_nothing_is_written(tmp_path, mixed):
    run(tmp_path, **mixed | {"data__ledger": "false", "training__steps": "1"})
    assert not (tmp_path / "ledger").exists()
