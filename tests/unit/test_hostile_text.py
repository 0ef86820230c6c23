"""Hostile lines of JSON and settings: bounded, counted, and named by place.

Every row of "Hostile input" in docs/reliability.md is held by a test in test_hostile_*.py, in
test_remote.py or in tests/fuzz; what fuzzing finds becomes a test here.
"""

import json
import os

import pytest

from tests.hostile import SPEC, ask, bounds, raw_png
from titan_vlm.config import load_config
from titan_vlm.data.chat import Encoder
from titan_vlm.data.config import Data
from titan_vlm.data.limits import limits
from titan_vlm.data.loader import PackedRows, RowLoader
from titan_vlm.data.mixture import Member, Mixture
from titan_vlm.data.sources.files import JsonlFile
from titan_vlm.data.sources.jsonl import JsonlSource
from titan_vlm.data.tokenizer import load_tokenizer
from titan_vlm.errors import ConfigError, DataError
from titan_vlm.models.moe.tokens import name_key

GOOD = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}


def test_a_line_longer_than_memory_is_never_held(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + '{"a": "')
    os.truncate(path, 2**28)  # without the NULs on the disk
    with open(path, "ab") as file:
        file.write(b"\n" + json.dumps(GOOD).encode() + b"\n")
    with bounds(20, 10):
        source = JsonlSource(str(path), "openai")
        assert len(source) == 3 and source[0].origin.endswith("a.jsonl:1")
        assert source[2].origin.endswith("a.jsonl:3")
        with pytest.raises(DataError, match=r"a.jsonl:2: a line of 26\d+ bytes, at most data.max_"):
            source[1]


def test_lines_are_found_whatever_the_size_of_the_pieces(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    text = "\ufeff\n  \n" + "".join(f'{{"a": "{"x" * k}"}}\n' + "\n" * (k % 3) for k in range(40))
    path.write_text(text + '{"last": 1}')
    whole = JsonlFile(str(path))
    monkeypatch.setattr("titan_vlm.data.sources.files.PIECE", 7)
    pieces = JsonlFile(str(path))
    assert len(whole) == 42  # the byte order mark alone is a line that is not blank
    assert (whole.starts, whole.lengths, whole.lines) == (
        pieces.starts, pieces.lengths, pieces.lines
    )  # fmt: skip
    lines = text.splitlines()
    assert [pieces.lines[k] for k in range(1, 41)] == [
        n for n, line in enumerate(lines, 1) if line.startswith("{")
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\xff\xfe{}", "malformed JSON"),
        (b'{"messages": "\xc3\x28"}', "malformed JSON"),
        (b'{"messages": []}\0', "malformed JSON"),
        (b"\0" * 50, "malformed JSON"),
        (b'{"a":' * 100_000, "malformed JSON"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "malformed JSON"),
        (b'{"messages": 7}', 'needs "messages" (list), got 7'),
        (b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}", 'a message needs "role"'),
        (b'{"messages": [{"role": ["user"]}]}', 'needs "role" (str)'),
        (b'{"messages": [{"role": "' + b"x" * 9000 + b'"}]}', 'role: "xxx'),
        (b'{"messages": [{"role": "user", "content": [[]]}]}', 'a part needs "type"'),
        (b"true", "expected a JSON object, got bool"),
        (b"NaN", "expected a JSON object, got float"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_odd_lines_are_refused_by_file_and_line(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    source = JsonlSource(str(path), "openai")
    with bounds(2.0, 20), pytest.raises(DataError) as refusal:
        source[1]
    text = str(refusal.value)
    assert text.startswith(f"{path}:2: ") and said in text and len(text) < 2100
    assert text.isprintable()


@pytest.mark.parametrize("fps", ["Infinity", "NaN", "0", "-1", "true", "1" * 400, "1e400", '"2"'])
def test_a_rate_that_no_clock_keeps_is_refused(tmp_path, fps):
    video = f'{{"type": "video", "video": ["a.png"], "fps": {fps}}}'
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"messages": [{{"role": "user", "content": [{video}]}}]}}\n')
    with pytest.raises(DataError, match="a.jsonl:1: fps: expected a positive number, got"):
        JsonlSource(str(path), "openai")[0]


@pytest.mark.parametrize("own", ["[[]]", '"' + "x" * 5000 + '"', "null", '"\\ud800"', "7", '"k"'])
def test_an_id_is_a_name_or_number_of_some_length_or_not_taken(tmp_path, own):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD)[:-1] + f', "id": {own}}}\n')
    sample = JsonlSource(str(path), "openai")[0]
    assert sample.id in (f"{path}:1", "7", "k", "\ud800") and name_key(sample.id) > 0


@pytest.mark.parametrize("form", ["openai", "llava"])
def test_turns_pictures_and_text_are_limited_before_they_cost(tmp_path, form):
    """The chat template renders a conversation once per turn: a million turns would never end."""
    path = tmp_path / "a.jsonl"

    def record(turns, text="a", pictures=0):
        if form == "openai":
            parts = [{"type": "text", "text": text}]
            parts += [{"type": "image", "image": "a.png"}] * pictures
            return {"messages": [{"role": "user", "content": parts}] * turns}
        turn = {"from": "human", "value": "<image>" * pictures + text}
        return {"conversations": [turn] * turns, "image": ["a.png"] * pictures}

    cases = {
        "turns, texts and pictures, at most data.max_sample_parts = 1000": (
            record(20_000),
            record(1, pictures=20_000),
        ),
        "characters, at most data.max_sample_chars = 1000000": (record(1, "x" * 1_000_001),),
    }
    for said, hostile in cases.items():
        for one in hostile:
            path.write_text(json.dumps(one))
            with bounds(5.0, 200), pytest.raises(DataError, match=f"a.jsonl:1: .*{said}"):
                JsonlSource(str(path), form)[0]
    path.write_text(json.dumps(record(450)))
    assert len(JsonlSource(str(path), form)[0].messages) == 450


def test_what_is_hostile_is_counted_and_the_rest_is_trained_on(tmp_path):
    path = tmp_path / "a.jsonl"
    (tmp_path / "bomb.png").write_bytes(raw_png(20_000, 20_000))
    (tmp_path / "cut.png").write_bytes(raw_png(40, 40, bytes(1640))[:-40])
    hostile = [
        '{"a":' * 790,
        '{"messages": ' + "9" * 5000 + "}",
        "\0",
        "x" * 5000,
        json.dumps({"messages": ask("bomb.png")}),
        json.dumps({"messages": ask("cut.png")}),
        json.dumps({"messages": ask("../../etc/passwd")}),
        json.dumps({"messages": ask("http://127.0.0.1/a.png")}),
    ]
    lines = [json.dumps(GOOD | {"id": k}) for k in range(8)]
    path.write_text("\n".join(line for pair in zip(hostile, lines, strict=True) for line in pair))
    source = JsonlSource(str(path), "openai", limits=limits(Data(max_sample_bytes=4000)))
    rows = PackedRows(
        Mixture([Member("odd", source)]),
        Encoder(load_tokenizer(), SPEC),
        seq_len=64,
        virtual_shards=1,
        window=16,
    )
    loader, seen = RowLoader(rows), set()
    for _ in range(40):
        seen |= {int(name.split(":")[2]) for name in next(loader).sample_ids}
    assert seen == set(range(1, 16, 2))
    assert loader.counts.bad / loader.counts.seen == pytest.approx(0.5, abs=0.1)
    assert all(f"{path}:" in reason for reason in loader.reasons) and loader.reasons


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#" * 70_000, "expected at most 65536 bytes"),
        ("a." * 30_000 + "a = 1", "expected at most 500 dots in a line"),
        ("x = { " + "a." * 30_000 + "a = 1 }", "expected at most 500 dots in a line"),
        ("a" * 60_000 + " = 1", "unknown key"),
        ("training." + "s" * 60_000 + " = 1", "unknown key"),
        ("a = " + "[" * 60_000, "nested too deeply"),
        ("[data]\nvirtual_shards = " + "9" * 5000, "not valid TOML|expected int"),
        ("[data]\npath = '\0'", "not valid TOML"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_file_is_refused_in_no_time(tmp_path, text, said):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with bounds(2.0, 50), pytest.raises(ConfigError, match=said) as refusal:
        load_config(str(path))
    assert str(refusal.value).startswith(str(path)) and len(str(refusal.value)) < 2100


def test_a_message_is_one_printable_line_of_bounded_length():
    text = str(DataError("a.jsonl:7: " + "\x1b[2J\r\n\u202e" + "x" * 10**6 + " the end"))
    assert text.startswith("a.jsonl:7: ") and text.endswith("the end")
    assert text.isprintable() and len(text) < 2100
