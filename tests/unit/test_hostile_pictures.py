"""Hostile pictures: bounded, counted, and named by place.

Every row of "Hostile input" in docs/reliability.md is held by a test in test_hostile_*.py, in
test_remote.py or in tests/fuzz; what fuzzing finds becomes a test here.
"""

import io
import os
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.hostile import SPEC, ask, bounds, noise, raw_png, ref, saved
from titan_vlm.data.config import Data
from titan_vlm.data.limits import limits
from titan_vlm.data.sample import ImageRef, VideoRef, known_formats, open_file
from titan_vlm.data.sources import build_source
from titan_vlm.data.sources.messages import from_llava, from_openai
from titan_vlm.data.sources.webdataset import WebDatasetSource
from titan_vlm.data.videos import plan_video
from titan_vlm.errors import ConfigError, DataError


@pytest.mark.parametrize("side", [9_500, 13_500, 2_000_000_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    bomb = ref(raw_png(side, side, bytes(10_000)))
    known_formats()  # reading the decoders takes time, once
    for use in (bomb.header_size, bomb.load_rgb):
        with (
            bounds(1.0, 1),
            pytest.raises(DataError, match=r"a.png: .*pixels.* data.max_image_pixels = 89478485"),
        ):
            use()


def test_the_limit_on_pixels_is_a_setting_and_exact():
    data = saved(Image.new("RGB", (100, 50)), "PNG")
    assert ref(data, max_image_pixels=5000).load_rgb().size == (100, 50)
    with pytest.raises(DataError, match="100 x 50 pixels, at most data.max_image_pixels = 4999"):
        ref(data, max_image_pixels=4999).load_rgb()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG"])
def test_a_picture_without_pixels_is_refused(kind):
    data = bytearray(saved(Image.new("RGB", (8, 8)), kind))
    if kind == "PNG":
        data = raw_png(0, 0)
    for pattern in (b"\x08\0\x08\0", b"\x08\0\0\0\x08\0\0\0", b"\0\x08\0\x08"):
        data = data.replace(pattern, bytes(len(pattern)))
    with pytest.raises(DataError, match=r"a.png: (cannot be read|broken)"):
        picture = ref(bytes(data))
        picture.header_size()
        picture.load_rgb()


def test_a_size_of_nothing_is_refused_whoever_states_it():
    with pytest.raises(DataError, match="0 x 5: no pixels"):
        ImageRef("a", lambda: Image.new("RGB", (0, 5))).header_size()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_picture_is_refused_wherever_it_ends(kind):
    data = saved(Image.fromarray(noise(60, 40)), kind)
    for end in range(0, len(data) * 9 // 10, max(len(data) // 50, 1)):
        picture = ref(data[:end])
        with pytest.raises(DataError, match="a.png: (cannot be read|broken)"):
            picture.header_size()
            picture.load_rgb()


def test_a_wrong_extension_does_not_matter(tmp_path):
    pixels = noise()
    (tmp_path / "a.jpg").write_bytes(saved(Image.fromarray(pixels), "PNG"))
    image = ImageRef("a", partial(open_file, str(tmp_path / "a.jpg"))).load_rgb()
    assert np.array_equal(np.asarray(image), pixels)


def test_formats_that_start_a_program_are_not_opened():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(DataError, match="cannot identify"):
        ref(eps).header_size()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_what_pillow_makes_of_it(kind):
    data = saved(Image.fromarray(noise(channels=4), "CMYK"), kind)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(ref(data).load_rgb()), np.asarray(expected))
    assert len(np.unique(np.asarray(expected))) > 100


@pytest.mark.parametrize("transparent", [None, 3, bytes(range(256))])
def test_a_palette_is_looked_up_and_its_transparency_lies_over_white(transparent):
    colours, indices = noise(256, 1)[0], noise(channels=1)[..., 0]
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    extra = {} if transparent is None else {"transparency": transparent}
    result = np.asarray(ref(saved(image, "PNG", **extra)).load_rgb()).astype(int)
    alpha = np.full(256, 255)
    if isinstance(transparent, bytes):
        alpha = np.frombuffer(transparent, np.uint8).astype(int)
    elif transparent is not None:
        alpha[transparent] = 0
    over_white = (colours * alpha[:, None] + 255 * (255 - alpha[:, None])) / 255
    assert abs(result - over_white[indices]).max() <= 1


def test_16_bits_keep_their_high_byte_grey_or_colour():
    """Grey of 16 bits comes out as Pillow's own reader takes the same values as 16-bit colour."""
    values = np.arange(0, 65536, 77, dtype=np.uint16).reshape(4, -1)
    rows = values.astype(">u2")
    grey = b"".join(b"\0" + row.tobytes() for row in rows)
    colour = b"".join(b"\0" + np.repeat(row, 3).tobytes() for row in rows)
    size = values.shape[::-1]
    expected = np.asarray(Image.open(io.BytesIO(raw_png(*size, colour, depth=16, colour=2))))
    assert np.array_equal(expected[..., 0], values >> 8)
    for data in (
        raw_png(*size, grey, depth=16),
        raw_png(*size, colour, depth=16, colour=2),
        saved(Image.fromarray(values), "TIFF"),
    ):
        assert np.array_equal(np.asarray(ref(data).load_rgb()), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_without_a_white_are_refused(dtype):
    data = saved(Image.fromarray(np.linspace(0, 1, 64, dtype=dtype).reshape(8, 8)), "TIFF")
    with pytest.raises(DataError, match="32-bit grey has no agreed white"):
        ref(data).load_rgb()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_what_pillow_makes_of_it(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(noise()), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    picture = ref(data)
    assert picture.header_size() == expected.size
    assert np.array_equal(np.asarray(picture.load_rgb()), np.asarray(expected))


def test_a_jpeg_of_thousands_of_scans_is_refused():
    data = saved(Image.fromarray(noise(64, 64)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    assert ref(data).load_rgb().size == (64, 64)
    scans = data[:start] + (data[start:-2]) * 2000 + data[-2:]
    with bounds(1.0, 20), pytest.raises(DataError, match=r"a JPEG of 20\d\d scans, at most 100"):
        ref(scans).load_rgb()


def test_a_jpeg_that_its_source_has_decoded_already_is_taken():
    picture = Image.open(io.BytesIO(saved(Image.fromarray(noise(64, 64)), "JPEG")))
    expected = np.asarray(picture.convert("RGB"))
    assert picture.fp is None
    assert np.array_equal(np.asarray(ImageRef("a.jpg", lambda: picture).load_rgb()), expected)


def test_a_file_of_any_size_is_not_opened(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(raw_png(8, 8, bytes(72)))
    assert ImageRef("a.png", partial(open_file, str(path))).header_size() == (8, 8)
    os.truncate(path, 2**40)
    with bounds(1.0, 1), pytest.raises(DataError, match="a file of 1099511627776 bytes, at most"):
        ImageRef("a.png", partial(open_file, str(path))).header_size()


@pytest.fixture
def folders(tmp_path):
    """data/a.png, and outside of it secret.png, to which data/link.png leads."""
    (tmp_path / "data").mkdir()
    for path in ("data/a.png", "secret.png"):
        (tmp_path / path).write_bytes(saved(Image.new("RGB", (40, 20)), "PNG"))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    return tmp_path


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    "where",
    ["../secret.png", "x/../../secret.png", "{}/secret.png", "file://{}/secret.png", "link.png"],
)
def test_pictures_outside_of_the_folder_are_refused_unless_allowed(folders, where, kind):
    where, root = where.format(folders), str(folders / "data")
    with pytest.raises(DataError, match="lies outside of .*data.image_root .*data.allow_outside"):
        from_openai(ask(where, kind), root)
    turns = [{"from": "human", "value": f"<{kind}>"}, {"from": "gpt", "value": "Red."}]
    with pytest.raises(DataError, match="lies outside of"):
        from_llava({kind: where, "conversations": turns}, root)
    allowed = limits(Data(allow_outside=True))
    assert from_openai(ask(where, kind), root, limits=allowed)


def test_pictures_within_are_found_by_every_kind_of_name(folders):
    for where in ("a.png", "./a.png", "../data/a.png", str(folders / "data" / "a.png")):
        image = from_openai(ask(where), str(folders / "data"))[0]["content"][0]["image"]
        assert image.header_size() == (40, 20)
    # A folder whose name only begins the same is another one.
    (folders / "data2").mkdir()
    with pytest.raises(DataError, match="lies outside"):
        from_openai(ask("../data2/a.png"), str(folders / "data"))


@pytest.mark.parametrize("where", ["a\0.png", "\ud800.png", "x" * 100_000, "/" * 5000])
def test_names_that_no_file_can_have_are_refused(folders, where):
    with pytest.raises(DataError):
        from_openai(ask(where), str(folders / "data"))[0]["content"][0]["image"].header_size()


def test_a_pipe_or_a_device_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for name in (str(tmp_path / "a.png"), "/dev/zero"):
        with pytest.raises(DataError, match="no regular file"):
            ImageRef(name, partial(open_file, name)).header_size()
        pytest.importorskip("av")
        with pytest.raises(DataError, match="no regular file"):
            plan_video(VideoRef(name, path=name), SPEC)
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(ConfigError, match="no such file, or no .tar in it"):
        WebDatasetSource(str(tmp_path), "What?")


def test_a_play_list_leads_a_video_to_no_other_file(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.ts"), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (96, 64)))))
        container.mux(stream.encode())
    video = VideoRef("v", path=str(tmp_path / "v.ts"))
    assert plan_video(video, SPEC).grid[0] > 0
    (tmp_path / "l.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\nv.ts\n#EXT-X-ENDLIST\n"
    )
    with av.open(str(tmp_path / "l.m3u8")) as container:
        assert container.streams.video[0].width == 96
    with pytest.raises(DataError, match="cannot be read as a video"):
        plan_video(VideoRef("l", path=str(tmp_path / "l.m3u8")), SPEC)
    small = VideoRef("v", path=video.path, limits=limits(Data(max_image_pixels=96 * 64 - 1)))
    with pytest.raises(DataError, match="96 x 64 pixels, at most data.max_image_pixels = 6143"):
        plan_video(small, SPEC)


def test_a_table_names_no_picture_outside_of_its_folder(folders, monkeypatch):
    class Table(list):
        """What HfSource uses of a datasets.Dataset; a row that is an error cannot be read."""

        column_names, features = ("image", "text"), {"image": "path"}

        def __getitem__(self, index):
            if isinstance(row := super().__getitem__(index), Exception):
                raise row
            return {"image": row, "text": "Red."}

    secret = str(folders / "secret.png")
    rows = Table(["a.png", {"path": "a.png"}, {"path": secret}, "../secret.png", OSError("torn")])
    package = SimpleNamespace(
        Image=type("Image", (), {}),
        DatasetDict=type("DatasetDict", (dict,), {}),
        load_from_disk=lambda path: rows,
    )
    monkeypatch.setitem(sys.modules, "datasets", package)
    source = build_source(Data("hf", str(folders / "data")), "train", 0)
    for index in (0, 1):
        image = source[index].messages[0]["content"][0]["image"]
        assert image.header_size() == (40, 20)
    for index in (2, 3):
        with pytest.raises(DataError, match=f":{index}: .*lies outside of"):
            source[index]
    with pytest.raises(DataError, match=":4: unreadable row: torn"):
        source[4]
