"""docs/reliability.md promises what tests hold."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_promise_names_a_test_that_is_there():
    text = (ROOT / "docs" / "reliability.md").read_text()
    table = text.partition("## Promises and their tests")[2]
    rows = [row.split("|")[2] for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 13
    for row in rows:
        source = ""
        for file, name in re.findall(r"`(?:([\w/]+\.py))?(?:::)?(test_\w+)?`", row):
            source = (ROOT / "tests" / file).read_text() if file else source
            assert not name or f"def {name}(" in source, f"{file} {name}"
        assert source, row
