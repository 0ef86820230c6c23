"""The demo: real digits, split by scan, a pure function of (seed, split, index)."""

import re
from collections import Counter

import numpy as np
import pytest

from tests.small_run import small_config
from titan_vlm.data.digits import CELL, KIND_CYCLE, SCANS, TRAIN_SCANS, DigitsSource
from titan_vlm.errors import ConfigError


@pytest.fixture(scope="module")
def train():
    return DigitsSource("train", seed=0)


@pytest.fixture(scope="module")
def validation():
    return DigitsSource("validation", seed=0)


def content(raw):
    images = [p["image"] for p in raw.messages[0]["content"] if p["type"] == "image"]
    return images, raw.meta["question"], raw.meta["answer"]


def pixels(raw):
    return [np.asarray(image.open()).copy() for image in content(raw)[0]]


def test_no_scan_is_in_both_splits(train, validation):
    scans = {(scan.tobytes(), label) for scan, label in zip(train.scans, train.labels, strict=True)}
    held = [(s.tobytes(), y) for s, y in zip(validation.scans, validation.labels, strict=True)]
    assert len(train.scans) == TRAIN_SCANS and len(held) == SCANS - TRAIN_SCANS
    assert not scans & set(held)


def test_a_sample_is_a_function_of_seed_split_and_index(train):
    again = DigitsSource("train", seed=0)
    other = DigitsSource("train", seed=1)
    for index in (0, 5, 11999, 30000):
        assert content(train[index])[1:] == content(again[index])[1:]
        assert all(map(np.array_equal, pixels(train[index]), pixels(again[index])))
    differs = [content(train[i])[1:] != content(other[i])[1:] for i in range(50)]
    assert sum(differs) > 20


def test_every_epoch_distorts_training_pictures_anew_and_validation_pictures_never(
    train, validation
):
    first, second = pixels(train[0])[0], pixels(train[len(train)])[0]
    assert first.shape == second.shape and not np.array_equal(first, second)
    # A question on one digit has the same picture in every epoch of validation.
    assert KIND_CYCLE[0] == "which"
    plain, later = pixels(validation[0])[0], pixels(validation[len(validation)])[0]
    assert np.array_equal(plain, later)


def test_answers_are_right_for_every_kind(validation):
    """Checked against the scans that the pictures are drawn from."""
    labels = {id(scan): y for scan, y in zip(validation.scans, validation.labels, strict=True)}
    kinds = Counter()
    for index in range(400):
        raw = validation[index]
        images, question, answer = content(raw)
        kind = raw.meta["kind"]
        kinds[kind] += 1
        shown = [[labels[id(s)] for row in im.open.args[0] for s in row] for im in images]
        flat = [digit for picture in shown for digit in picture]
        if kind == "count":
            wanted = int(next(c for c in question if c.isdigit()))
            expected = flat.count(wanted)
        elif kind == "row":
            assert 2 <= len(flat) <= 5
            expected = "".join(map(str, flat))
        else:
            expected = {"which": flat[0], "sum": sum(flat), "larger": max(flat)}[kind]
            assert len(images) == len(flat) == (1 if kind == "which" else 2)
        if kind == "larger":
            assert flat[0] != flat[1]
        assert answer == str(expected) == raw.messages[1]["content"][0]["text"]
    assert set(kinds) == set(KIND_CYCLE)


def test_a_source_of_some_kinds_asks_them_in_turn(validation):
    source = DigitsSource("validation", seed=0, kinds=["row", "words", "between"])
    assert len(source) == 3 * len(validation.scans)
    labels = {id(scan): y for scan, y in zip(source.scans, source.labels, strict=True)}
    kinds = [source[k].meta["kind"] for k in range(6)]
    assert kinds == ["row", "words", "between"] * 2
    for index in range(1, 90, 3):
        words, between = source[index], source[index + 1]
        (part,) = words.messages[0]["content"]
        digits = re.match(r"[\d ]+", part["text"])[0]
        shown = [int(digit) for digit in digits.split()]
        row = "".join(map(str, shown))
        expected = {str(sum(shown)), str(max(shown)), row} if len(shown) == 2 else {row}
        assert words.meta["answer"] in expected
        parts = between.messages[0]["content"]
        assert [p["type"] for p in parts] == ["image", "text"] * (len(parts) // 2) + ["image"]
        scans = [p["image"].open.args[0][0][0] for p in parts if p["type"] == "image"]
        assert between.meta["answer"] == str(sum(labels[id(s)] for s in scans))
        assert {p["text"] for p in parts if p["type"] == "text"} == {" plus "}


def test_kinds_are_for_the_digits_alone(tmp_path):
    with pytest.raises(ConfigError, match=r'data.kinds: expected none for source = "openai"'):
        small_config(tmp_path, data__source="openai", data__path="x", data__kinds="row")
    with pytest.raises(ConfigError, match="data.kinds: expected list of which|sum"):
        small_config(tmp_path, data__kinds="rows")


def test_an_epoch_shows_every_scan_once_to_every_place_of_the_cycle(validation):
    single = [place for place, kind in enumerate(KIND_CYCLE) if kind == "which"]
    for place in single:
        shown = [
            content(validation[k])[0][0].open.args[0][0][0]
            for k in range(place, len(validation), len(KIND_CYCLE))
        ]
        assert sorted(map(id, shown)) == sorted(map(id, validation.scans))
    # The first few samples, which an evaluation asks, repeat no scan.
    few = [validation[k] for k in range(200) if validation[k].meta["kind"] == "which"]
    scans = [id(content(raw)[0][0].open.args[0][0][0]) for raw in few]
    assert len(few) == 50 and len(set(scans)) == 50


def test_pictures_have_the_size_that_is_announced(train):
    for index in range(40):
        for image in content(train[index])[0]:
            drawn = image.open()
            assert drawn.size == image.header_size()
            assert drawn.size[0] % CELL == 0 and drawn.size[1] % CELL == 0
            assert np.asarray(drawn).max() > 100  # something is visible


def test_cells_can_be_larger():
    source = DigitsSource("validation", seed=0, cell=64)
    assert content(source[0])[0][0].header_size() == (64, 64)
    assert pixels(source[0])[0].shape == (64, 64)


def test_unknown_split_is_refused():
    with pytest.raises(ConfigError, match='"train" and "validation"'):
        DigitsSource("test", seed=0)
