"""Pictures and videos that are damaged, missing or odd cost one sample, not the run."""

import errno
import io
import os
import sys
import tarfile
from types import SimpleNamespace

import pytest
from PIL import Image

from titan_vlm.data.config import Data
from titan_vlm.data.images import VisualSpec
from titan_vlm.data.sample import ImageRef, VideoRef
from titan_vlm.data.sources import build_source
from titan_vlm.data.videos import load_frames, plan_video, prepare_video
from titan_vlm.errors import DataError

SPEC = VisualSpec(1024, 100_000, 4096, 200_000)


class StrangeError(Exception):
    """As FFmpeg's PatchWelcomeError: of no built-in kind."""


class Clip:
    """What videos.py uses of a container that PyAV opened; `fails` breaks one of its steps."""

    def __init__(self, fails=None, widths=(32, 32, 32, 32), **header):
        self.fails, self.widths = fails, widths
        whole = {"frames": 4, "average_rate": 2, "width": 32, "height": 32}
        stream = SimpleNamespace(codec_context=SimpleNamespace(), **whole | header)
        self.streams = SimpleNamespace(video=[stream])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def demux(self, stream):
        return []

    def decode(self, video):
        if self.fails:
            raise self.fails
        for width in self.widths:
            yield SimpleNamespace(to_image=lambda width=width: Image.new("RGB", (width, 32)))


@pytest.fixture
def opens(monkeypatch, tmp_path):
    """Makes PyAV open every file as the given clip, or fail with the given error."""

    def opens(clip):
        def open(path, options):
            if isinstance(clip, Exception):
                raise clip
            return clip

        monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=open))
        (tmp_path / "v.mp4").touch()
        return VideoRef("v.mp4", path=str(tmp_path / "v.mp4"))

    return opens


@pytest.mark.parametrize(
    "odd",
    [{"average_rate": 0}, {"average_rate": None}, {"frames": 0}, {"width": 0}, {"height": 0}],
    ids=str,
)
def test_a_video_whose_header_makes_no_sense_is_refused(opens, odd):
    with pytest.raises(DataError, match=r"v.mp4: cannot be read as a video: \d+ frames of"):
        plan_video(opens(Clip(**odd)), SPEC)
    assert plan_video(opens(Clip()), SPEC).frame_indices == [0, 1, 2, 3]


# FFmpeg reports ENOMEM where a damaged file asks for terabytes.
DAMAGE = [StrangeError("odd"), ZeroDivisionError("odd"), OSError(errno.ENOMEM, "odd")]


@pytest.mark.parametrize("error", DAMAGE, ids=repr)
def test_whatever_a_damaged_video_raises_is_the_samples_fault(opens, error):
    with pytest.raises(DataError, match="v.mp4: cannot be read as a video: .*odd"):
        plan_video(opens(error), SPEC)
    with pytest.raises(DataError, match="v.mp4: broken video: .*odd"):
        load_frames(opens(Clip(fails=error)), [0, 1])


def test_a_video_that_cannot_be_opened_for_want_of_descriptors_is_not(opens):
    error = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(OSError, match="Too many open files"):
        plan_video(opens(error), SPEC)
    with pytest.raises(OSError, match="Too many open files"):
        load_frames(opens(Clip(fails=error)), [0, 1])


def test_a_video_whose_frames_change_their_size_is_refused(opens):
    with pytest.raises(DataError, match="v.mp4: frames of different sizes"):
        load_frames(opens(Clip(widths=(32, 64, 32))), [0, 1, 2])


def test_damaged_video_files_are_refused_or_read_but_never_crash(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (96, 64)))))
        container.mux(stream.encode())
    whole = path.read_bytes()
    refused = 0
    for at in range(whole.index(b"moov"), len(whole), 3):
        path.write_bytes(whole[:at] + b"\0\xff" + whole[at + 2 :])
        video = VideoRef("v.mp4", path=str(path))
        try:
            prepare_video(video, plan_video(video, SPEC), SPEC)
        except DataError:
            refused += 1
    assert refused


def test_a_rate_of_almost_nothing_takes_every_frame():
    frames = [ImageRef("f", Image.new("RGB", (32, 32)).copy)] * 6
    assert plan_video(VideoRef("v", frames, fps=1e-320), SPEC).frame_indices == list(range(6))


def shard(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_deeply_nested_caption_is_refused_by_shard_and_key(tmp_path):
    shard(tmp_path / "0.tar", ("7.jpg", b"x"), ("7.json", b"[" * 100_000))
    source = build_source(Data("webdataset", str(tmp_path)), "train", 0)
    with pytest.raises(DataError, match="0.tar:7: malformed caption"):
        source[0]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors as Linux does")
def test_a_source_of_many_files_holds_none_of_them_open(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    record = '{"messages": [{"role": "user", "content": "Why?"}]}\n'
    for k in range(20):
        shard(tmp_path / f"{k}.tar", ("7.png", picture.getvalue()), ("7.txt", b"A caption."))
        (tmp_path / f"{k}.jsonl").write_text(record)
    before = len(os.listdir("/proc/self/fd"))
    for kind in ("webdataset", "openai"):
        source = build_source(Data(kind, str(tmp_path)), "train", 0)
        raws = [source[k] for k in range(20)]
        assert len(os.listdir("/proc/self/fd")) == before
    assert len(raws) == 20


class Table(list):
    """What HfSource uses of a datasets.Dataset."""

    column_names = ("image", "text")
    features = {"image": "bytes"}


def test_a_row_of_a_table_without_its_picture_is_refused(tmp_path, monkeypatch):
    rows = Table([{"image": {"bytes": b"x"}, "text": "A cat."}, {"image": None, "text": "A dog."}])
    package = SimpleNamespace(
        Image=type("Image", (), {}),
        DatasetDict=type("DatasetDict", (dict,), {}),
        load_from_disk=lambda path: rows,
    )
    monkeypatch.setitem(sys.modules, "datasets", package)
    source = build_source(Data("hf", str(tmp_path)), "train", 0)
    assert source[0].meta["answer"] == "A cat."
    with pytest.raises(DataError, match=":1: image: no picture"):
        source[1]
