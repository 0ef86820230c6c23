"""Hostile shards, weights and pickles: bounded, counted, and named by place.

Every row of "Hostile input" in docs/reliability.md is held by a test in test_hostile_*.py, in
test_remote.py or in tests/fuzz; what fuzzing finds becomes a test here.
"""

import io
import json
import os
import tarfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.hostile import bounds, saved
from titan_vlm import flight_recorder
from titan_vlm.data.config import Data
from titan_vlm.data.limits import limits
from titan_vlm.data.sources.tar import members
from titan_vlm.data.sources.webdataset import TarShard, WebDatasetSource
from titan_vlm.errors import ConfigError, DataError
from titan_vlm.models.safetensors_io import read_headers


def archive(*entries, format=tarfile.USTAR_FORMAT) -> bytes:
    """Members of (name, data) or TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for entry in entries:
            info, data = entry, b""
            if isinstance(entry, tuple):
                info, data = tarfile.TarInfo(entry[0]), entry[1]
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def link(name, kind, target="/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


PNG = saved(Image.new("RGB", (40, 30)), "PNG")
SAMPLE = (("7.png", PNG), ("7.txt", b"A caption."))
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_those_that_the_standard_library_finds(tmp_path, format):
    names = ["a.txt", "x" * 90 + ".txt", f"{'d' * 60}/{'e' * 90}.txt"]
    if format != tarfile.USTAR_FORMAT:
        names += ["y" * 300 + ".txt", "\u00fc" * 200 + ".png"]
    entries = [(name, name.encode() * k) for k, name in enumerate(names)]
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    entries[1:1] = [link(f"l{k!r}", k, "z" * (150 if format else 90)) for k in kinds]
    path = tmp_path / "0.tar"
    path.write_bytes(archive(*entries, format=format))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert [(m.name, m.offset, m.size) for m in members(str(path))] == expected
    assert len(expected) == len(names)


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../../x", "\x1b[31mx"])
def test_a_name_that_climbs_out_is_only_a_name(tmp_path, name):
    path = tmp_path / "in" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(archive((f"{name}.png", PNG), (f"{name}.txt", b"A caption.")))
    source = WebDatasetSource(str(path), "What?")
    image = source[0].messages[0]["content"][0]["image"]
    assert image.load_rgb().size == (40, 30) and source[0].meta["answer"] == "A caption."
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "0.tar"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_not_followed(tmp_path, kind):
    path = tmp_path / "0.tar"
    path.write_bytes(archive(link("7.png", kind), SAMPLE[1]))
    with pytest.raises(DataError, match="0.tar:7: no picture"):
        WebDatasetSource(str(path), "What?")[0]


def with_size(data: bytes, at: int, size: bytes) -> bytes:
    """The header at this byte with another size and the checksum for it."""
    header = data[at : at + 124] + size + data[at + 136 : at + 512]
    total = sum(header) - sum(header[148:156]) + 8 * 32
    return data[:at] + header[:148] + b"%06o\0 " % total + header[156:] + data[at + 512 :]


# Of the second sample's picture: octal, base 256, and base 256 of a negative number, for which
# tarfile of Python 3.11 goes round in circles.
HUGE = [b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7]


@pytest.mark.parametrize("size", [*HUGE, b"\xff" * 12, b"-0000000001\0", b"0_0000000001"])
def test_a_size_without_the_bytes_costs_the_rest_of_the_shard_and_is_counted(tmp_path, size):
    second = (("8.png", PNG), ("8.txt", b"Another."))
    data = archive(*SAMPLE, *second)
    at = len(archive(*SAMPLE, format=tarfile.USTAR_FORMAT).rstrip(b"\0")) // 512 * 512 + 512
    assert data[at : at + 5] == b"8.png"
    path = tmp_path / "0.tar"
    path.write_bytes(with_size(data, at, size))
    with bounds(1.0, 2):
        source = WebDatasetSource(str(path), "What?")
        assert len(source) == 2 and source[0].meta["answer"] == "A caption."
        with pytest.raises(DataError, match=rf"0.tar: .*byte {at}\)?; what follows is lost"):
            source[1]


def test_a_truncated_shard_gives_what_is_whole_and_counts_the_rest(tmp_path):
    second = (("8.png", PNG), ("8.txt", b"Another."))
    data = archive(*SAMPLE, *second).rstrip(b"\0")
    path = tmp_path / "0.tar"
    for end in range(1, len(data), 97):
        path.write_bytes(data[:end])
        good, bad = [], []
        try:
            source = WebDatasetSource(str(path), "What?")
        except DataError as error:
            assert "not a plain tar file" in str(error) and end < 1024
            continue
        for index in range(len(source)):
            try:
                good.append(source[index].meta["answer"])
            except DataError as error:
                bad.append(str(error))
        assert good == ["A caption.", "Another."][: len(good)]
        assert any("what follows is lost" in reason for reason in bad) or end % 512 == 0


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path):
    """tarfile would say that the archive ends here, without a word."""
    data = bytearray(archive(*SAMPLE, ("8.png", PNG), ("8.txt", b"Another.")))
    at = bytes(data).index(b"8.png")
    data[at : at + 512] = b"x" * 512
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    source = WebDatasetSource(str(path), "What?")
    assert len(source) == 2
    with pytest.raises(DataError, match=f"0.tar: no tar header at byte {at}; what follows is lost"):
        source[1]


@pytest.mark.parametrize("hole", [512, 1024, 3 * 2**20])
def test_zeros_in_the_middle_are_not_taken_for_the_end(tmp_path, hole):
    first, second = archive(*SAMPLE), archive(("8.png", PNG), ("8.txt", b"Another."))
    at = (len(first.rstrip(b"\0")) + 511) // 512 * 512
    path = tmp_path / "0.tar"
    path.write_bytes(first[:at] + bytes(hole) + second)
    with bounds(1.0, 4):
        source = WebDatasetSource(str(path), "What?")
    assert len(source) == 2 and source[0].meta["answer"] == "A caption."
    said = f"0.tar: zeros at byte {at} and more at byte {at + hole}: a hole.*; what follows is lost"
    with pytest.raises(DataError, match=said):
        source[1]
    path.write_bytes(first[:at] + bytes(hole))
    assert len(WebDatasetSource(str(path), "What?")) == 1  # they are the end, however many


def test_members_and_captions_of_any_size_are_not_read(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(archive(("7.png", PNG + bytes(9000)), ("7.txt", b"x"), ("8.png", PNG)))
    with open(path, "r+b") as file:
        file.seek(-1024, 2)
        file.write(archive(("8.txt", b"x" * 9000)))
    source = WebDatasetSource(str(path), "What?", limits(Data(max_sample_bytes=8000)))
    with pytest.raises(DataError, match="0.tar:7: .*a picture of 9[0-9]+ bytes, at most data.max_"):
        source[0].messages[0]["content"][0]["image"].header_size()


def test_a_shard_of_many_members_takes_little_memory(tmp_path):
    """Of one name, too: only the suffixes that are read are remembered."""
    path = tmp_path / "0.tar"
    block = archive(("7.x1", b""))[:512]
    path.write_bytes(block * 10_000)
    with bounds(20.0, 1):
        assert len(TarShard(str(path))) == 1


def test_a_name_of_any_length_is_refused(tmp_path):
    path = tmp_path / "0.tar"
    long = archive(("n" * 70_000 + ".png", PNG), format=tarfile.GNU_FORMAT)
    path.write_bytes(archive(*SAMPLE).rstrip(b"\0").ljust(4 * 512, b"\0") + long)
    with bounds(1.0, 1):
        source = WebDatasetSource(str(path), "What?")
        with pytest.raises(DataError, match="a name of 70005 bytes at byte .*; what follows"):
            source[1]


def test_sparse_members_are_passed_over(tmp_path):
    """Their bytes lie elsewhere than a reader of slices would look."""
    sparse = tarfile.TarInfo("7.png")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "7.png"}
    path = tmp_path / "0.tar"
    path.write_bytes(archive(sparse, *SAMPLE[1:], format=tarfile.PAX_FORMAT))
    with pytest.raises(DataError, match="0.tar:7: no picture"):
        WebDatasetSource(str(path), "What?")[0]


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": "b\\u0000"}}',
        '{"weight_map": {"a": "pipe"}}',
        '{"weight_map": {"a": "' + "x" * 256 + '"}}',
        '{"weight_map": {"a": "' + "\\u00fc" * 128 + '"}}',
        "[" * 100_000,
        "\xff",
    ],
    ids=lambda index: index[:40],
)
def test_an_index_names_files_beside_it_or_is_refused(tmp_path, index):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    os.mkfifo(folder / "pipe")
    (folder / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    with pytest.raises(ConfigError, match=str(folder)):
        read_headers(folder)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**40]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}},
        {"a": 7},
    ],
    ids=str,
)
def test_a_header_that_does_not_add_up_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(data)
    with bounds(1.0, 5), pytest.raises(ConfigError, match="model.safetensors is damaged"):
        read_headers(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8 + data[8:])
    with bounds(1.0, 5), pytest.raises(ConfigError, match="model.safetensors is damaged"):
        read_headers(tmp_path)


def test_a_pickle_in_the_recorders_place_runs_nothing(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    import pickle

    monkeypatch.setattr(flight_recorder, "uses_nccl", lambda: True)
    monkeypatch.setattr(flight_recorder, "NCCL_DUMP_S", 0.3)
    monkeypatch.setattr(flight_recorder, "nccl_file", lambda: tmp_path / "dump")
    (tmp_path / "dump").write_bytes(pickle.dumps({"entries": [Evil()]}))
    assert flight_recorder.nccl_entries() == [] and not (tmp_path / "ran").exists()
    (tmp_path / "dump").write_bytes(pickle.dumps({"entries": [{"state": "completed", "x": 1.5}]}))
    assert flight_recorder.nccl_entries() == [{"state": "completed", "x": 1.5}]
