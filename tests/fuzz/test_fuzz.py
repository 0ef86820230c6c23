"""Random damage to everything that is read: one of our own errors or a result, within bounds.

A small, fixed selection runs always, 20,000 and more inputs of each kind behind the mark slow. An
input that got through is kept as a test of its own in tests/unit/test_hostile_*.py.
"""

import base64
import io
import json
import resource
import signal
import string
import struct
import tarfile
import time
import tomllib
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image

from titan_vlm.config import CONFIG_DIR, Config, config_to_toml, load_config
from titan_vlm.data.chat import Encoder
from titan_vlm.data.config import Data
from titan_vlm.data.images import VisualSpec, image_grid, prepare_image
from titan_vlm.data.limits import limits
from titan_vlm.data.rows import make_row
from titan_vlm.data.sample import ImageRef, known_formats, open_bytes
from titan_vlm.data.sources.jsonl import JsonlSource
from titan_vlm.data.sources.webdataset import WebDatasetSource
from titan_vlm.data.tokenizer import load_tokenizer
from titan_vlm.errors import ConfigError, DataError
from titan_vlm.models.safetensors_io import INDEX, TensorSpec, read_headers, write_shards

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

QUICK, FULL = 700, 25_000
CPU_SECONDS = 2.0  # of one input
HANG_SECONDS = 60
MEMORY_BYTES = 2**29  # by which a whole run may grow the process
LIMITS = limits(Data(max_image_pixels=10**6, max_sample_bytes=2**20, max_sample_chars=10**5))
SPEC = VisualSpec(1024, 65536, 1024, 65536)

inputs = pytest.mark.parametrize("inputs", [QUICK, pytest.param(FULL, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """Hypothesis wants them; the trainer, in tests before these, has switched them off."""
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(True)


def fuzz(strategy, use, inputs: int) -> None:
    """Calls `use` with that many examples, the same ones each time."""
    count = 0

    @hypothesis.settings(
        max_examples=inputs,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def one(example):
        nonlocal count
        count += 1
        if seconds(example) >= CPU_SECONDS:
            # Python collects the garbage of the whole process in one input or another: not twice.
            assert seconds(example) < CPU_SECONDS

    def seconds(example) -> float:
        start = time.process_time()
        with no_hang():
            use(example)
        return time.process_time() - start

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(f"{count} inputs, {grown / 2**20:.0f} MiB more")
    assert count >= inputs and grown < MEMORY_BYTES


@contextmanager
def no_hang():
    def give_up(number, frame):
        raise AssertionError(f"more than {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


WORDS = [b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80" + b"\0" * 11]
WORDS += [b"\xff" * 12, b"77777777777\0", b"[" * 2000, b"9" * 5000, b"\xed\xa0\x80", b'"', b"\n"]


def damage(originals: list[bytes]):
    """One of these, with up to six edits anywhere."""
    place = st.integers(0, 2**20)
    edit = st.tuples(
        st.sampled_from(["overwrite", "insert", "delete", "double", "cut"]),
        place,
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(WORDS)),
        st.integers(1, 600),
    )

    def apply(original: bytes, edits) -> bytes:
        data = original
        for kind, where, word, length in edits:
            at = where % (len(data) + 1)
            if kind == "overwrite":
                data = data[:at] + word + data[at + len(word) :]
            elif kind == "insert":
                data = data[:at] + word + data[at:]
            elif kind == "delete":
                data = data[:at] + data[at + length :]
            elif kind == "double":
                data = data[: at + length] + data[at:]
            else:
                data = data[:at]
        return data

    return st.builds(apply, st.sampled_from(originals), st.lists(edit, max_size=6))


def leaves():
    odd = [
        2**63,
        -(2**63),
        10**4000,
        1e308,
        float("inf"),
        float("nan"),
        "\ud800",
        "\0",
        "../..",
        "",
    ]
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(odd),
    )


# --- settings ------------------------------------------------------------------------------------


def toml_texts():
    whole = config_to_toml(Config())
    files = [path.read_bytes() for path in sorted(CONFIG_DIR.glob("*.toml"))]
    tree = tomllib.loads(whole)
    sections = st.sampled_from(list(tree))
    names = st.sampled_from([key for section in tree.values() for key in section])
    value = st.recursive(
        st.one_of(st.booleans(), st.integers(), st.floats(), st.text(string.printable, max_size=8)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text("ab.", max_size=3), inner)
        ),
        max_leaves=6,
    )
    made = st.dictionaries(sections, st.one_of(value, st.dictionaries(names, value, max_size=4)))
    return st.one_of(
        damage([whole.encode(), *files]),
        made.map(lambda table: tomli_w.dumps(table).encode(errors="replace")),
        st.text(alphabet="a.=[]{}\"'#\\\n1e_-:,T ", max_size=60).map(str.encode),
    )


@inputs
def test_settings(tmp_path, inputs):
    path = tmp_path / "x.toml"

    def use(data: bytes):
        path.write_bytes(data)
        try:
            config = load_config(str(path))
        except ConfigError as error:
            assert len(str(error)) < 3000 and str(error).isprintable()
        else:
            path.write_text(config_to_toml(config))
            assert load_config(str(path)) == config

    fuzz(toml_texts(), use, inputs)


# --- lines of JSON -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return Encoder(load_tokenizer(), SPEC)


def picture_bytes(kind="PNG", mode="RGB", size=(40, 30), **options) -> bytes:
    grey = Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint32).astype(np.uint8))
    image = Image.frombytes("L", size, grey.tobytes())
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def records() -> list[dict]:
    inline = "data:image/png;base64," + base64.b64encode(picture_bytes(size=(2, 2))).decode()
    parts = [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "image": inline},
        {"type": "video", "video": ["a.png"] * 4, "fps": 1.0},
    ]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]
    llava = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    return [{"id": 7, "messages": turns}, {"id": "x", "image": "a.png", "conversations": llava}]


def json_lines():
    words = ["type", "text", "image", "image_url", "url", "video", "fps", "role", "content", "path"]
    words += ["messages", "conversations", "from", "value", "user", "assistant", "human", "gpt"]
    words += ["id", "a.png", "<image>", "<video>", "<|image_pad|>", "http://a/b", "file:///x"]
    key = st.sampled_from(words)
    tree = st.recursive(
        st.one_of(leaves(), key),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(key, inner, max_size=4)
        ),
        max_leaves=20,
    )

    def graft(record: dict, value, where: int) -> dict:
        """The record with one of its nodes replaced."""
        record = json.loads(json.dumps(record))
        spots = []

        def visit(node):
            keys = node if isinstance(node, dict) else range(len(node))
            for key in list(keys):
                spots.append((node, key))
                if isinstance(node[key], dict | list):
                    visit(node[key])

        visit(record)
        node, key = spots[where % len(spots)]
        node[key] = value
        return record

    grafted = st.builds(graft, st.sampled_from(records()), tree, st.integers(0, 100))
    return st.one_of(
        damage([json.dumps(record).encode() for record in records()]),
        st.one_of(grafted, tree).map(lambda value: json_text(value).encode(errors="replace")),
    )


def json_text(value) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # an integer with too many digits to print
        return '{"id": ' + "9" * 5000 + "}"


@inputs
def test_lines(tmp_path, encoder, inputs):
    (tmp_path / "a.png").write_bytes(picture_bytes())
    path = tmp_path / "x.jsonl"

    def use(data: bytes):
        path.write_bytes(data)
        for form in ("openai", "llava"):
            try:
                source = JsonlSource(str(path), form, limits=LIMITS)
            except ConfigError as error:
                assert "one JSON array" in str(error)
                continue
            for index in range(len(source)):
                try:
                    sample = encoder.encode(source[index])
                except DataError as error:
                    assert f"{path}:" in str(error) and len(str(error)) < 3000
                else:
                    make_row([sample], len(sample), encoder, lambda *_: None)

    fuzz(json_lines(), use, inputs)


# --- pictures ------------------------------------------------------------------------------------


def png_again(data: bytes) -> bytes:
    """A PNG with the checksums that its chunks ask for, so that damage reaches the decoder."""
    out, at = [data[:8]], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        end = at + 8 + length
        if end + 4 > len(data):
            break
        out += [data[at:end], struct.pack(">I", zlib.crc32(data[at + 4 : end]))]
        at = end + 4
    return b"".join(out) + data[at:]


def pictures():
    turned = Image.Exif()
    turned[0x0112] = 6
    made = [picture_bytes("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    made += [picture_bytes("JPEG", mode, exif=turned) for mode in ("L", "RGB", "CMYK")]
    made += [picture_bytes("JPEG", progressive=True, size=(200, 100))]
    made += [picture_bytes("TIFF", mode) for mode in ("1", "P", "RGB", "CMYK", "I;16", "F", "LAB")]
    made += [picture_bytes("TIFF", compression=c) for c in ("tiff_lzw", "tiff_deflate", "jpeg")]
    made += [picture_bytes(kind) for kind in ("GIF", "BMP", "WEBP", "PPM")]
    made += [picture_bytes(k) for k in ("AVIF", "JPEG2000") if k in known_formats()]
    return st.one_of(damage(made), damage(made[:7]).map(png_again))


@inputs
@pytest.mark.filterwarnings("ignore")  # Pillow's about damaged files
def test_pictures(inputs):
    def use(data: bytes):
        ref = ImageRef("x", lambda: open_bytes(data, LIMITS))
        try:
            width, height = ref.header_size()
            assert 0 < width * height <= LIMITS.max_image_pixels
            grid = image_grid(width, height, SPEC)
            pixels = prepare_image(ref.load_rgb(), grid, SPEC)
        except DataError:
            return
        assert pixels.shape == (grid[1] * grid[2], SPEC.patch_dim) and np.isfinite(pixels).all()

    fuzz(pictures(), use, inputs)


# --- shards --------------------------------------------------------------------------------------


def shard(format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in (
            ("1.png", picture_bytes()),
            ("1.txt", b"A caption."),
            (f"{'folder/' * 20}2.png", picture_bytes(size=(8, 8))),
            (f"{'folder/' * 20}2.json", b'{"caption": "Another."}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


def checksums_again(data: bytes) -> bytes:
    """Every block that looks like a header with the checksum that it asks for."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for number, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            total = sum(block) - sum(block[148:156]) + 8 * 32
            blocks[number] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


@inputs
def test_shards(tmp_path, encoder, inputs):
    made = [
        shard(format) for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ]
    path = tmp_path / "0.tar"

    def use(data: bytes):
        path.write_bytes(data)
        try:
            source = WebDatasetSource(str(tmp_path), "What?", LIMITS)
        except DataError as error:
            assert "0.tar: not a plain tar file" in str(error)
            return
        for index in range(len(source)):
            try:
                sample = encoder.encode(source[index])
            except DataError as error:
                assert "0.tar:" in str(error)
            else:
                make_row([sample], len(sample), encoder, lambda *_: None)

    fuzz(st.one_of(damage(made), damage(made).map(checksums_again)), use, inputs)


# --- weights -------------------------------------------------------------------------------------


@inputs
def test_weights(tmp_path, inputs):
    specs = {f"layer.{k}.weight": TensorSpec((4, k + 1), torch.float32) for k in range(3)}
    write_shards(tmp_path, specs, lambda name: torch.ones(specs[name].shape), 70)
    file = next(iter(sorted(tmp_path.glob("*.safetensors"))))
    originals = [file.read_bytes(), (tmp_path / INDEX).read_bytes()]
    index = json.loads(originals[1])
    grafts = st.dictionaries(
        st.sampled_from(["metadata", "weight_map", *specs]),
        st.one_of(leaves(), st.dictionaries(st.sampled_from([*specs]), leaves())),
    )

    def length_again(data: bytes) -> bytes:
        """The header's true length before it."""
        end = data.rfind(b"}") + 1
        return max(end - 8, 0).to_bytes(8, "little") + data[8:]

    damaged = damage(originals[:1])
    headers = st.one_of(damaged, damaged.map(length_again)).map(lambda data: (data, originals[1]))
    indices = st.one_of(
        damage(originals[1:]), grafts.map(lambda graft: json_text(index | graft).encode())
    ).map(lambda data: (originals[0], data))

    def use(both):
        file.write_bytes(both[0])
        (tmp_path / INDEX).write_bytes(both[1])
        try:
            for info in read_headers(tmp_path).values():
                assert tuple(info.read().shape) == info.shape
        except ConfigError as error:
            assert str(tmp_path) in str(error)

    fuzz(st.one_of(headers, indices), use, inputs)
