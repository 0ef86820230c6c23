"""Storage that fails is waited for; what it fails for is never a bad sample."""

import builtins
import errno
import io
import os
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.hostile import SPEC, noise, saved
from tests.unit.test_data_loader import TinySource, tiny_loader
from tests.unit.test_data_media import Clip
from titan_vlm.data import reading
from titan_vlm.data.reading import PAUSES_S
from titan_vlm.data.sample import ImageRef, VideoRef
from titan_vlm.data.sources.files import JsonlFile
from titan_vlm.data.sources.hf import HfSource
from titan_vlm.data.tokenizer import load_tokenizer
from titan_vlm.data.videos import load_frames, plan_video
from titan_vlm.errors import DataError, ReadError

PNG = saved(Image.fromarray(noise(200, 150)), "PNG")
PASSING = ["EIO", "ESTALE", "ETIMEDOUT", "ECONNRESET", "ENOTCONN"]
TRIES = len(PAUSES_S) + 1


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Those that were made."""
    made = []
    monkeypatch.setattr(reading, "time", SimpleNamespace(sleep=made.append))
    return made


class Trouble:
    """Called, fails as often as it is told."""

    def __init__(self, name, times):
        self.number, self.left = getattr(errno, name), times

    def __call__(self):
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))


class File(io.BytesIO):
    """A picture's file of which the pixels cannot be read, while there is trouble."""

    def __init__(self, trouble):
        super().__init__(PNG)
        self.trouble = trouble

    def read(self, *count):
        if self.tell() > 1000:
            self.trouble()
        return super().read(*count)


def fails_to_open(trouble):
    trouble()
    return Image.open(io.BytesIO(PNG))


def fails_to_load(trouble):
    return Image.open(File(trouble))


USES = [
    (ImageRef.header_size, fails_to_open),
    (ImageRef.load_rgb, fails_to_open),
    (ImageRef.load_rgb, fails_to_load),
]


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize(("use", "open"), USES)
def test_a_picture_is_waited_for_and_then_ends_the_run(pauses, use, open, name):
    for times in range(TRIES):
        found = use(ImageRef("a.png", partial(open, Trouble(name, times))))
        assert found == (200, 150) or np.array_equal(found, noise(200, 150))
        assert tuple(pauses) == PAUSES_S[:times]
        pauses.clear()
    said = os.strerror(getattr(errno, name))
    with pytest.raises(ReadError, match=rf"^a.png: {said} \(4 tries in 6 seconds\); .* goes on"):
        use(ImageRef("a.png", partial(open, Trouble(name, TRIES))))


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "ENAMETOOLONG", "ELOOP"])
@pytest.mark.parametrize(("use", "open"), USES)
def test_what_another_try_would_not_change_is_the_samples_fault_at_once(pauses, use, open, name):
    with pytest.raises(DataError, match=f"a.png: .*{os.strerror(getattr(errno, name))}"):
        use(ImageRef("a.png", partial(open, Trouble(name, 1))))
    assert pauses == []


@pytest.fixture
def disk(monkeypatch):
    """Sets the trouble of opening any file called broken."""
    now, real = {"trouble": lambda: None}, builtins.open

    def open(path, *words, **more):
        if "broken" in os.path.basename(str(path)):
            now["trouble"]()
        return real(path, *words, **more)

    monkeypatch.setattr(builtins, "open", open)
    return lambda trouble: now.update(trouble=trouble)


def test_a_line_is_waited_for_and_then_ends_the_run(tmp_path, disk):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    file = JsonlFile(str(path))
    disk(Trouble("ESTALE", TRIES - 1))
    assert file.record(1) == {"a": 2}
    disk(Trouble("ESTALE", TRIES))
    with pytest.raises(ReadError, match=f"^{path}: {os.strerror(errno.ESTALE)}"):
        file.record(1)


def test_a_row_of_a_table_is_waited_for_and_then_ends_the_run():
    class Rows:
        trouble = Trouble("EIO", TRIES - 1)

        def __getitem__(self, number):
            self.trouble()
            return {"text": number}

    source = HfSource.__new__(HfSource)
    source.path, source.rows = "table", Rows()
    assert source._row(7) == {"text": 7}
    Rows.trouble = Trouble("EIO", TRIES)
    with pytest.raises(ReadError, match="^table: Input/output error"):
        source._row(7)


def test_a_video_that_ffmpeg_cannot_read_is_bad_only_if_its_file_can_be_read(
    tmp_path, monkeypatch, disk
):
    """FFmpeg says EIO of damaged files and of failing disks alike."""
    trouble = {}

    def open(path, options):
        trouble["now"]()
        return Clip()

    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=open))
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"x")
    for use in (partial(plan_video, spec=SPEC), partial(load_frames, indices=[0, 1])):
        video = VideoRef("v.mp4", path=str(path))
        trouble["now"] = Trouble("EIO", 1)
        disk(Trouble("EIO", TRIES - 1))
        assert use(video) is not None
        trouble["now"] = Trouble("EIO", 2)
        with pytest.raises(DataError, match="broken.mp4: .*Input/output error"):
            use(video)
        trouble["now"] = Trouble("EIO", 1)
        disk(Trouble("EIO", TRIES))
        with pytest.raises(ReadError, match="broken.mp4: Input/output error"):
            use(video)


class Unreadable(TinySource):
    def __getitem__(self, index):
        if index % self.size == 5:
            raise ReadError("tiny:5: Input/output error")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_counts_nothing_as_bad_that_could_not_be_read(workers):
    loader = tiny_loader(load_tokenizer(), Unreadable(20), workers)
    with pytest.raises(ReadError, match="^tiny:5: Input/output error$"):
        for _ in range(60):
            next(loader)
    loader.close()
    assert loader.counts.bad == 0
