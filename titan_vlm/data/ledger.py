"""The ledger of a run: which samples each of its steps consumed.

    run.output_dir/ledger/
      reader0.jsonl     {"step": 1, "readers": 2, "rows": [["text:0:17", "web:0:4"], ["web:0:9"]],
      reader1.jsonl      "skipped": []}

One file for each rank that reads rows of its own, one line for each step, written when the step is
done: the ids of the samples in each of its rows, and of those left out on the way. An id is
name:epoch:number, the sample's number within its source, counted from 0.

With `of` readers, row i of a step is in the file of reader i mod `of`; `read_ledger` puts the rows
of all files back into the order of the run, the same for any number of readers. A run that goes on
at step n first drops what was written of later steps, as they are about to run again.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from titan_vlm.data.rows import Row
from titan_vlm.errors import DataError
from titan_vlm.jsonl import Lines

FOLDER = "ledger"
_FILE = re.compile(r"reader(\d+)\.jsonl")
_STEP = re.compile(rb'\{"step": (\d+),')


class Ledger:
    """Writes the file of one reader.

    Args:
        directory: `run.output_dir`.
        last_step: steps done so far; later ones are dropped, by reader 0 also from the files of
            readers that are no more.
    """

    def __init__(self, directory: str | Path, reader: int, readers: int, last_step: int):
        self.readers = readers
        folder = Path(directory) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        if reader == 0:
            for number, path in ledger_files(directory).items():
                if number >= readers:
                    cut_after(path, last_step)
        path = folder / f"reader{reader}.jsonl"
        path.touch()
        cut_after(path, last_step)
        self._file = Lines(path)

    def write(self, step: int, rows: Iterable[Row]) -> None:
        """The rows that this reader brought to a step, counted from 1."""
        rows = list(rows)
        line = {
            "step": step,
            "readers": self.readers,
            "rows": sample_ids(rows),
            "skipped": [id for row in rows for id in row.skipped],
        }
        self._file.write(line)

    def sync(self) -> None:
        """On the disk, before a checkpoint that counts these samples as read."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def cut_after(path: Path, last_step: int) -> None:
    """Shortens a file to the lines of the steps up to this one; a torn last line goes too."""
    kept = 0
    with path.open("rb+") as file:
        for line in file:
            step = _STEP.match(line)
            if not step or int(step[1]) > last_step or not line.endswith(b"\n"):
                break
            kept += len(line)
        file.truncate(kept)


def sample_ids(rows: Iterable[Row]) -> list[list[str]]:
    """The ids of the samples in each row."""
    return [list(row.sample_ids) for row in rows]


def name_samples(rows: Iterable[Row]) -> list[str]:
    """The samples of these rows for a message, each with where it is: "web:0:17 (a.jsonl:18)"."""
    return [
        f"{id} ({origin})"
        for row in rows
        for id, origin in zip(row.sample_ids, row.origins, strict=True)
    ]


@dataclass
class Step:
    """What a step consumed: ids by row, in the order of the run, and the ids left out."""

    rows: list[list[str]]
    skipped: list[str] = field(default_factory=list)


def read_ledger(directory: str | Path) -> dict[int, Step]:
    """The steps that are done, in order, from the files of all readers in `run.output_dir`.

    A step that was cut short, so that not every reader has written it, is left out if it is the
    last.

    Raises:
        DataError: there is no ledger; a line is no record; steps are missing; or files of other
            parts of the run are among them, as where readers write to disks of their own.
    """
    files = ledger_files(directory)
    if not files:
        raise DataError(f"{directory}: no ledger/reader0.jsonl; set data.ledger = true")
    lines: dict[int, dict[int, dict]] = {}
    for reader, path in sorted(files.items()):
        for record in _last_lineage(path):
            lines.setdefault(record["step"], {})[reader] = record
    steps = {}
    for step, by_reader in sorted(lines.items()):
        wanted = {record["readers"] for record in by_reader.values()}
        if step == max(lines) and len(wanted) == 1 and len(by_reader) < max(wanted):
            continue
        _check(directory, step, by_reader, wanted, previous=max(steps, default=step - 1))
        steps[step] = _merge([by_reader[reader] for reader in sorted(by_reader)])
    return steps


def ledger_files(directory: str | Path) -> dict[int, Path]:
    """By number of the reader."""
    found = (Path(directory) / FOLDER).glob("reader*.jsonl")
    return {int(match[1]): path for path in found if (match := _FILE.fullmatch(path.name))}


def _last_lineage(path: Path) -> list[dict]:
    """The lines without a last one that has no end (the process died while it wrote it), and
    without steps that ran again behind them."""
    kept: list[dict] = []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        record = _record(line, f"{path}:{number}")
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def _record(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
        record["step"], record["readers"], record["rows"], record["skipped"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: expected a line of the ledger, got {line:.60}") from error
    return record


def _check(directory, step: int, by_reader: dict, wanted: set[int], previous: int) -> None:
    if step != previous + 1:
        raise DataError(
            f"{directory}: the ledger has step {previous} and then step {step}; the run was "
            "without data.ledger in between, or files of it are gone"
        )
    if len(wanted) > 1 or sorted(by_reader) != list(range(max(wanted))):
        raise DataError(
            f"{directory}: step {step} of the ledger is of readers "
            f"{', '.join(map(str, sorted(by_reader)))}, written for {sorted(wanted)} of them; "
            "bring the files of all readers, and no others, into one folder"
        )


def _merge(records: list[dict]) -> Step:
    """Row i is in the file of reader i mod R."""
    rows = [row for turn in zip(*(r["rows"] for r in records), strict=True) for row in turn]
    return Step(rows, [id for record in records for id in record["skipped"]])
