"""Odd samples are skipped with a reason, never trained wrongly and never the end of a run."""

import base64
import errno
import io
import json
import shutil
from functools import partial

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from titan_vlm.data.chat import Encoder
from titan_vlm.data.images import VisualSpec
from titan_vlm.data.packing import cut_sample
from titan_vlm.data.sample import ImageRef, RawSample, VideoRef, open_bytes, open_file
from titan_vlm.data.sources.files import read_slice
from titan_vlm.data.sources.jsonl import JsonlSource
from titan_vlm.data.sources.messages import from_llava, from_openai, local_path
from titan_vlm.data.tokenizer import DEMO_TOKENIZER, load_tokenizer
from titan_vlm.data.videos import plan_video
from titan_vlm.errors import ConfigError, DataError

SPEC = VisualSpec(
    min_pixels=1024,
    max_pixels=65536,
    video_min_pixels=1024,
    video_max_pixels=65536,
    video_fps=2.0,
    patch_size=16,
    merge_size=2,
    temporal_patch_size=2,
)
ASK = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "So."}


@pytest.fixture(scope="module")
def encoder():
    return Encoder(load_tokenizer(), SPEC)


def encode(encoder, messages):
    return encoder.encode(RawSample("id", from_openai(messages, ""), "here:1"))


def picture(width=40, height=20):
    return Image.fromarray(np.zeros((height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "without messages"),
        ([ANSWER], "turn 1 is the assistant's"),
        ([ASK, {"role": "assistant", "content": ""}], "turn 2: the assistant says nothing"),
        ([ASK, {"role": "assistant", "content": " \n"}], "turn 2: the assistant says nothing"),
        ([ASK, ANSWER, ASK, {"role": "assistant", "content": ""}], "turn 4"),
        ([ASK, {"role": "assistant", "content": "a\ud800b"}], "no Unicode"),
        ([ASK, {**ANSWER, "tool_calls": [{"name": "f"}]}], '"tool_calls"'),
        ([ASK, {**ANSWER, "reasoning_content": "Hm."}], '"reasoning_content"'),
    ],
)
def test_a_conversation_that_teaches_nothing_is_refused(encoder, messages, said):
    with pytest.raises(DataError, match=said):
        encode(encoder, messages)


@pytest.mark.parametrize(
    "where",
    ["http://[x/a.png", "data:image/png;base64,caf\u00e9", "data:image/png;base64,A", 5, {"a": 1}],
)
def test_an_odd_image_reference_is_refused(where):
    with pytest.raises(DataError):
        from_llava({"image": where, "conversations": [{"from": "human", "value": "<image>"}]}, "")


def test_a_deeply_nested_line_is_refused_by_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n' + "[" * 100_000 + "\n")
    source = JsonlSource(str(tmp_path / "a.jsonl"), "openai")
    with pytest.raises(DataError, match=r"a\.jsonl:2: malformed JSON"):
        source[1]


def test_a_json_array_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "a.json").write_text('\n [{"conversations": []}]')
    with pytest.raises(ConfigError, match="one object per line"):
        JsonlSource(str(tmp_path / "a.json"), "llava")


def test_a_file_url_may_hold_escapes():
    assert local_path("file:///data/a%20b.png", "") == "/data/a b.png"


def test_a_llava_video_is_a_video(tmp_path):
    turns = [{"from": "human", "value": "<video>What? <image>"}, {"from": "gpt", "value": "A."}]
    record = {"video": "a.mp4", "image": "b.png", "conversations": turns}
    parts = from_llava(record, "root")[0]["content"]
    assert [part["type"] for part in parts] == ["video", "text", "image"]
    assert parts[0]["video"].path == "root/a.mp4"
    with pytest.raises(DataError, match=r"video-token mismatch: 1 <video> marker\(s\) for 0"):
        from_llava({"image": "b.png", "conversations": turns}, "")


def test_running_out_of_descriptors_is_not_the_samples_fault():
    def no_descriptor_left():
        raise OSError(errno.EMFILE, "Too many open files")

    for use in (ImageRef.header_size, ImageRef.load_rgb):
        with pytest.raises(OSError, match="Too many open files"):
            use(ImageRef("a.png", no_descriptor_left))


def test_reading_many_shards_holds_none_of_them_open(tmp_path):
    import os

    before = len(os.listdir("/proc/self/fd"))
    for i in range(50):
        (tmp_path / str(i)).write_bytes(b"0123456789")
        assert read_slice(str(tmp_path / str(i)), 3, 4) == b"3456"
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8, 9, 200])
def test_the_header_tells_the_size_of_the_upright_picture(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind.lower()}"
    picture().save(path, kind, exif=exif)
    ref = ImageRef(path.name, partial(open_file, str(path)))
    assert ref.header_size() == ref.load_rgb().size


@pytest.mark.parametrize("fps", [0.7, 1.1, 1.3, 1.7, 2.0])
@pytest.mark.parametrize("total", [6, 7, 20, 51])
def test_frames_without_a_rate_are_taken_as_they_are(fps, total):
    from dataclasses import replace

    frames = [ImageRef("f", picture, (40, 32)) for _ in range(total)]
    plan = plan_video(VideoRef("v", frames), replace(SPEC, video_fps=fps))
    assert plan.frame_indices == list(range(total))


def test_a_cut_leaves_no_marker_of_what_was_cut_away(encoder):
    frames = [ImageRef("f", partial(picture, 64, 64), (64, 64)) for _ in range(4)]
    image = ImageRef("i", partial(picture, 64, 64), (64, 64))
    content = [
        {"type": "text", "text": "Then."},
        {"type": "image", "image": image},
        {"type": "video", "video": VideoRef("v", frames)},
        {"type": "text", "text": "What?"},
    ]
    messages = [ASK, ANSWER, {"role": "user", "content": content}, ANSWER]
    sample = encoder.encode(RawSample("id", messages, "here"))
    tokens = sample.tokens_L.tolist()
    start, end = encoder.ids.vision_start, encoder.ids.vision_end
    for length in range(tokens.index(start), len(tokens)):
        cut = cut_sample(sample, length)
        kept = cut.tokens_L.tolist()
        assert kept == tokens[: len(kept)] and len(kept) <= length
        assert kept.count(start) == kept.count(end)
        assert np.array_equal(cut.positions_3L, sample.positions_3L[:, : len(kept)])


def changed_tokenizer(tmp_path, **changes):
    """The demo's tokenizer with other entries in its configuration."""
    directory = tmp_path / "tokenizer"
    shutil.copytree(DEMO_TOKENIZER, directory)
    for template in directory.glob("chat_template*"):
        template.unlink()
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.setdefault("chat_template", load_tokenizer().chat_template)
    (directory / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}",
    ],
    ids=["breaks on parts", "leaves parts out"],
)
def test_a_template_made_for_text_alone_is_refused(tmp_path, template):
    with pytest.raises(ConfigError, match="does not render content that is a list of parts"):
        load_tokenizer(str(changed_tokenizer(tmp_path, chat_template=template)))


def test_a_truncation_stored_in_the_tokenizer_is_not_obeyed(tmp_path):
    directory = changed_tokenizer(tmp_path)
    stored = Tokenizer.from_file(str(directory / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=100)
    stored.save(str(directory / "tokenizer.json"))
    plain = encode(Encoder(load_tokenizer(), SPEC), [ASK, ANSWER])
    read = encode(Encoder(load_tokenizer(str(directory)), SPEC), [ASK, ANSWER])
    assert read.tokens_L.tolist() == plain.tokens_L.tolist()


def test_padding_is_the_end_of_text_where_a_tokenizer_has_no_pad(tmp_path):
    tokenizer = load_tokenizer()
    tokenizer.pad_token = None
    assert Encoder(tokenizer, SPEC).pad_id == tokenizer.eos_token_id != 0


def test_a_picture_given_as_data_is_read():
    buffer = io.BytesIO()
    picture(40, 20).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    (message,) = from_openai([{"role": "user", "content": [part]}], "")
    assert message["content"][0]["image"].header_size() == (40, 20)
    assert ImageRef("a", partial(open_bytes, buffer.getvalue())).load_rgb().size == (40, 20)
