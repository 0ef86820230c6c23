"""Messages: what a record says beside its texts and pictures is never dropped in silence."""

import pytest

from titan_vlm.data.sources.jsonl import JsonlSource
from titan_vlm.data.sources.messages import from_openai
from titan_vlm.errors import ConfigError, DataError


def answer(**more):
    return [{"role": "assistant", "content": "So.", **more}]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tool_calls", [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]),
        ("tool_call_id", "1"),
        ("name", "Bob"),
        ("audio", {"id": "1"}),
        ("weight", 0),  # "not to be learnt", the opposite of what would happen
    ],
)
def test_a_key_that_is_not_understood_is_refused_by_name(key, value):
    with pytest.raises(DataError, match=f'"{key}" of a message is not understood'):
        from_openai(answer(**{key: value}), "")


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_a_key_without_a_value_says_nothing(nothing):
    # A table has every key in every row.
    assert from_openai(answer(tool_calls=nothing), "") == from_openai(answer(), "")


@pytest.mark.parametrize("start", [b"[", b"\n  [", b"\xef\xbb\xbf["], ids=["plain", "blank", "bom"])
def test_a_file_that_is_one_array_is_refused_however_it_begins(tmp_path, start):
    path = tmp_path / "a.json"
    path.write_bytes(start + b'{"messages": []}]')
    with pytest.raises(ConfigError, match="a.json is one JSON array; write one object per line"):
        JsonlSource(str(path), "openai")


def test_a_byte_order_mark_before_the_first_record_is_no_part_of_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "Why?"}]}\n')
    source = JsonlSource(str(path), "openai")
    assert source[0].messages[0]["content"] == [{"type": "text", "text": "Why?"}]
