"""Encoding: what is trained on, where pictures stand, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from titan_vlm.data.chat import Encoder
from titan_vlm.data.images import VisualSpec, image_grid, prepare_image
from titan_vlm.data.packing import cut_sample
from titan_vlm.data.sample import ImageRef, RawSample, VideoRef, image_part, text_part, video_part
from titan_vlm.data.tokenizer import load_tokenizer
from titan_vlm.errors import DataError

SPEC = VisualSpec(
    min_pixels=32 * 32, max_pixels=1 << 20, video_min_pixels=4096, video_max_pixels=1 << 20
)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(load_tokenizer(), SPEC)


def picture(width=64, height=32):
    image = Image.new("RGB", (width, height), (9, 99, 199))
    return ImageRef(f"{width}x{height}", image.copy)


def conversation(*turns):
    """Alternating user and assistant turns; a turn is a text or a list of parts."""
    roles = ["user", "assistant"] * len(turns)
    return [
        {"role": role, "content": [text_part(turn)] if isinstance(turn, str) else turn}
        for role, turn in zip(roles, turns, strict=False)
    ]


def encode(encoder, messages, id="x"):
    return encoder.encode(RawSample(id, messages, "file.jsonl:3"))


def trained_text(encoder, sample):
    """The runs of consecutive targets, decoded; each target is the token after its position."""
    runs, run = [], []
    for position, label in enumerate(sample.labels_L.tolist()):
        if label == -100:
            if run:
                runs.append(encoder.tokenizer.decode(run))
            run = []
            continue
        assert label == sample.tokens_L[position + 1]
        run.append(label)
    return runs + ([encoder.tokenizer.decode(run)] if run else [])


def test_only_assistant_turns_and_their_end_are_trained_on(encoder):
    messages = [{"role": "system", "content": "Be brief."}]
    messages += conversation(
        [image_part(picture()), text_part("What is it?")], "A cat.", "And now?", "Two\nlines.\n"
    )
    sample = encode(encoder, messages)
    assert trained_text(encoder, sample) == ["A cat.<|im_end|>", "Two\nlines.\n<|im_end|>"]


def test_text_that_looks_like_a_turn_is_found_by_place_not_by_search(encoder):
    sample = encode(encoder, conversation("Say assistant\n7", "7", "Again: 7", "7"))
    assert trained_text(encoder, sample) == ["7<|im_end|>", "7<|im_end|>"]


def test_plain_string_content_is_the_same_as_a_text_part(encoder):
    parts = encode(encoder, conversation("Hi", "Yes"))
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert encode(encoder, plain).tokens_L.tolist() == parts.tokens_L.tolist()


def test_each_placeholder_becomes_one_token_per_merged_patch(encoder):
    parts = [image_part(picture(64, 32)), text_part("or"), image_part(picture(96, 96))]
    sample = encode(encoder, conversation(parts, "Both."))
    assert [v.grid for v in sample.visuals] == [(1, 2, 4), (1, 6, 6)]
    assert [v.end - v.start for v in sample.visuals] == [2, 9]
    for visual in sample.visuals:
        assert (sample.tokens_L[visual.start : visual.end] == encoder.ids.image).all()
        assert sample.tokens_L[visual.start - 1] == encoder.ids.vision_start
        assert sample.tokens_L[visual.end] == encoder.ids.vision_end
    assert sample.visual_L.sum() == 11


def test_visual_tokens_in_an_assistant_turn_are_not_trained_on(encoder):
    sample = encode(encoder, conversation("Draw", [text_part("Here"), image_part(picture())]))
    assert trained_text(encoder, sample) == ["Here", "<|im_end|>"]


def test_positions_of_text_and_pictures_follow_the_grid(encoder):
    parts = [image_part(picture(96, 64)), text_part("!")]
    sample = encode(encoder, conversation(parts, "ok"))
    start, end = sample.visuals[0].start, sample.visuals[0].end
    at = start  # text before the picture counts one by one
    assert sample.positions_3L[:, :start].tolist() == [list(range(start))] * 3
    assert sample.positions_3L[:, start:end].tolist() == [
        [at] * 6,
        [at, at, at, at + 1, at + 1, at + 1],
        [at, at + 1, at + 2] * 2,
    ]
    assert sample.positions_3L[:, end].tolist() == [at + 3] * 3  # the longer side is 3


def test_a_model_with_positions_in_one_dimension_counts_visual_tokens_as_text():
    plain = Encoder(load_tokenizer(), replace(SPEC, positions="1d"))
    sample = encode(plain, conversation([image_part(picture(96, 64)), text_part("!")], "ok"))
    assert sample.positions_3L.tolist() == [list(range(len(sample)))] * 3


def test_a_frame_has_as_many_tokens_as_the_model_makes_of_any():
    fixed = Encoder(load_tokenizer(), replace(SPEC, tokens=7, positions="1d"))
    clip = video_part(VideoRef("clip", [picture(64, 64) for _ in range(6)], fps=2.0))
    sample = encode(fixed, conversation([image_part(picture()), image_part(picture(96, 96))], "ok"))
    assert [v.end - v.start for v in sample.visuals] == [7, 7]
    assert [v.grid for v in sample.visuals] == [(1, 2, 4), (1, 6, 6)]  # patches stay as they were
    sample = encode(fixed, conversation([clip, text_part("What?")], "ok"))
    assert sample.visual_L.sum() == 3 * 7


@pytest.mark.parametrize(("width", "height"), [(64, 32), (10, 500), (3000, 2000)])
def test_square_pictures_are_as_large_as_the_limit_allows(width, height):
    spec = replace(SPEC, max_pixels=100 * 100, square=True, merge_size=1, temporal_patch_size=1)
    grid = image_grid(width, height, spec)
    assert grid == (1, 6, 6)
    assert prepare_image(picture(width, height).load_rgb(), grid, spec).shape == (36, 768)
    assert image_grid(width, height, replace(spec, max_pixels=9)) == (1, 1, 1)


def test_video_is_announced_by_the_time_of_each_pair_of_frames(encoder):
    frames = [picture(64, 64) for _ in range(6)]
    parts = [video_part(VideoRef("clip", frames, fps=2.0)), text_part("What happens?")]
    sample = encode(encoder, conversation(parts, "Nothing."))
    text = encoder.tokenizer.decode(sample.tokens_L)
    assert [f"<{t} seconds>" in text for t in ("0.2", "1.2", "2.2")] == [True] * 3
    assert sample.visuals[0].grid == (3, 4, 4)
    assert (sample.tokens_L == encoder.ids.video).sum() == 12
    assert sample.visuals[0].pixels(SPEC).shape == (48, 1536)


def test_prompt_for_generation_is_the_beginning_of_the_training_text(encoder):
    messages = conversation([image_part(picture()), text_part("What?")], "A cat.")
    prompt = encoder.encode_prompt(messages[:1])
    sample = encode(encoder, messages)
    assert prompt.tokens_L.tolist() == sample.tokens_L[: len(prompt)].tolist()
    assert prompt.positions_3L.tolist() == sample.positions_3L[:, : len(prompt)].tolist()
    assert sample.labels_L[len(prompt) - 1] != -100  # the very next token is the first target
    assert (prompt.labels_L == -100).all()


@pytest.mark.parametrize(
    "user",
    [
        [text_part("<|image_pad|> what?")],
        [image_part(picture()), text_part("and <|image_pad|>?")],
        [text_part("<|video_pad|>?")],
    ],
)
def test_a_placeholder_in_the_text_is_an_image_token_mismatch(encoder, user):
    with pytest.raises(DataError, match=r"^file.jsonl:3: image-token mismatch"):
        encode(encoder, conversation(user, "7"))


def test_template_that_drops_pictures_is_an_image_token_mismatch(encoder):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %};"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match="0 placeholder.* for 1 images"):
        encode(Encoder(tokenizer, SPEC), conversation([image_part(picture())], "7"))


def test_template_that_rewrites_earlier_turns_is_refused(encoder):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.role }}: {{ m.content[0].text }};"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match="does not extend its text turn by turn"):
        encode(Encoder(tokenizer, SPEC), conversation("a", "b"))


def test_sample_without_assistant_text_is_refused(encoder):
    with pytest.raises(DataError, match="file.jsonl:3: no assistant text"):
        encode(encoder, conversation("Only a question"))


def test_cutting_never_splits_a_picture_and_keeps_only_its_whole_pictures(encoder):
    messages = conversation(
        [image_part(picture()), text_part("?")], "One.", [image_part(picture(96, 96))], "Two."
    )
    sample = encode(encoder, messages)
    second = sample.visuals[1]
    for length in range(second.opening + 1, second.closing):
        short = cut_sample(sample, length)
        assert len(short) == second.start - 1
        assert [v.grid for v in short.visuals] == [(1, 2, 4)]
        assert short.visual_L.sum() == 2
    whole = cut_sample(sample, second.closing)
    assert len(whole.visuals) == 2 and whole.visual_L.sum() == 11
    assert cut_sample(sample, sample.visuals[0].closing) is None  # nothing left to learn
    assert whole.labels_L[-1] == -100
    assert np.array_equal(whole.tokens_L, sample.tokens_L[: second.closing])


def test_cutting_within_an_answer_keeps_no_target_that_was_cut_away(encoder):
    sample = encode(encoder, conversation("?", "one two three four"))
    targets = (sample.labels_L != -100).nonzero()[0]
    short = cut_sample(sample, targets[2] + 1)
    assert len(short) == targets[2] + 1
    assert (short.labels_L != -100).nonzero()[0].tolist() == targets[:2].tolist()
