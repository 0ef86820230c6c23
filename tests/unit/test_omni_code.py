"""The code that an export of OmniMoE brings: processor and model, as a caller meets them."""

import pytest
import torch
from PIL import Image

from tests.omni_directory import write_export
from titan_vlm.models.omni.export.modeling_titan_omni import (
    TitanOmniForConditionalGeneration,
    positions,
)
from titan_vlm.models.omni.export.processing_titan_omni import TitanOmniProcessor
from titan_vlm.models.omni.hf import read_config


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("omni") / "hf")


@pytest.fixture
def processor(written):
    return TitanOmniProcessor.from_pretrained(written[0])


PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("images", "text", "words"),
    [
        (1, "no place", "the texts place 0 pictures"),
        (0, PICTURE, "the texts place 1 pictures .* got 0"),
        (0, "<|video_pad|>", "videos: give their frames as pictures"),
        (1, None, "text: expected one that places the pictures"),
    ],
)
def test_texts_that_do_not_place_the_pictures_are_refused(processor, images, text, words):
    with pytest.raises(ValueError, match=words):
        processor(images=[Image.new("RGB", (40, 40))] * images, text=text)


def test_pictures_that_cannot_be_prepared_are_refused(processor):
    for image, words in [
        (Image.new("RGB", (2010, 10)), "longer than 1:200"),
        (Image.new("F", (40, 40)), "32-bit grey"),
        ("nowhere.png", "nowhere.png: no such file"),
    ]:
        with pytest.raises(ValueError, match=words):
            processor(images=image, text=PICTURE)
    with pytest.raises(TypeError, match="PIL image or a path, got int"):
        processor(images=3, text=PICTURE)


def test_a_processor_is_saved_as_it_was_read(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = TitanOmniProcessor.from_pretrained(tmp_path)
    image = Image.effect_noise((70, 50), 90)
    before, after = (x(images=image, text=PICTURE, return_tensors="pt") for x in (processor, again))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_prompt_in_pieces_is_the_prompt(written, processor):
    """Behind cached tokens, and with a placeholder among the words that were generated."""
    model = TitanOmniForConditionalGeneration.from_pretrained(written[0], dtype=torch.float64)
    text = PICTURE + "Which of them?"
    inputs = processor(images=Image.new("RGB", (64, 64)), text=text, return_tensors="pt")
    inputs["input_ids"][0, -1] = model.config.image_token_id
    ids, size = inputs["input_ids"], 7
    where = positions(model.config, ids[:, :-1], None, inputs["image_grid_thw"])
    where = torch.cat((where, where[..., -1:] + 1), -1)
    with torch.no_grad():
        first = model(
            ids[:, :size],
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            use_cache=True,
        )
        cache = first.past_key_values
        rest = [
            model(ids[:, a:b], position_ids=where[..., a:b], past_key_values=cache).logits
            for a, b in ((size, size + 3), (size + 3, ids.shape[1]))
        ]
        cut = {"input_ids": ids[:, :-1], "pixel_values": inputs["pixel_values"]}
        whole = model(**cut, image_grid_thw=inputs["image_grid_thw"]).logits
        with pytest.raises(ValueError, match="behind cached tokens position_ids are needed"):
            model(ids[:, -1:], past_key_values=cache)
        again = model(  # pictures that are cached are not looked at again
            ids[:, -1:] * 0 + 9,
            position_ids=where[..., -1:],
            past_key_values=cache,
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
        )
        assert again.logits.isfinite().all()
    pieces = torch.cat([first.logits, *rest], 1)
    assert (pieces[:, :-1] - whole).abs().max() < 1e-10 * whole.abs().max()


def test_transformers_saves_what_both_read_again(written, tmp_path):
    directory, parts, _ = written
    theirs = TitanOmniForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    again = TitanOmniForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        rough, exact = theirs(ids).logits, again(ids).logits
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()
    assert read_config(tmp_path) == parts.dims
    model = parts.spec.build(parts.dims)
    parts.spec.load_hf(model, tmp_path)
    assert torch.equal(model.text.embed.weight, theirs.text.embed.weight.float())


def test_visual_tokens_without_their_pictures_are_refused(written, processor):
    model = TitanOmniForConditionalGeneration.from_pretrained(written[0], dtype=torch.float32)
    inputs = processor(images=Image.new("RGB", (64, 64)), text=PICTURE + "?", return_tensors="pt")
    grid = inputs["image_grid_thw"]
    with pytest.raises(ValueError, match="4 visual tokens in input_ids and no pixel_values"):
        model(inputs["input_ids"])
    with pytest.raises(ValueError, match="not those of the pictures"):
        model(inputs["input_ids"], pixel_values=inputs["pixel_values"], image_grid_thw=grid * 2)
    cut = dict(inputs) | {key: inputs[key][:, :-2] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="ends within a picture"):
        model.generate(**cut)
    with pytest.raises(ValueError, match="visual tokens in input_ids and no image_grid_thw"):
        positions(model.config, inputs["input_ids"], None, None)


def test_a_static_cache_is_refused(written, processor):
    model = TitanOmniForConditionalGeneration.from_pretrained(written[0], dtype=torch.float32)
    inputs = processor(text="Which?", return_tensors="pt")
    with pytest.raises(ValueError, match="cache_implementation: only the dynamic cache"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def test_rows_of_a_batch_end_where_answers_begin(processor):
    """With padding behind them, `generate` would go on from the padding."""
    ids = processor(text=["One", "One, two, three"], padding=True, return_tensors="pt")["input_ids"]
    assert (ids[:, -1] != processor.tokenizer.pad_token_id).all()
    assert ids[0, 0] == processor.tokenizer.pad_token_id


def test_words_can_be_added(written):
    model = TitanOmniForConditionalGeneration.from_pretrained(written[0], dtype=torch.float32)
    ids = torch.arange(20)[None]
    before = model(ids).logits
    model.resize_token_embeddings(before.shape[-1] + 3)
    after = model(ids).logits
    assert after.shape[-1] == before.shape[-1] + 3
    torch.testing.assert_close(after[..., :-3], before)
