"""The run's one sequence of rows, whoever makes it and wherever it was interrupted."""

import dataclasses
import json
import pickle
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tests.small_run import curve, run, run_killed
from titan_vlm.config import Config, Training
from titan_vlm.data.chat import Encoder
from titan_vlm.data.config import Data
from titan_vlm.data.images import visual_spec
from titan_vlm.data.loader import PackedRows, RowLoader, build_loader, merge_states
from titan_vlm.data.mixture import Member, Mixture
from titan_vlm.data.packing import Counts
from titan_vlm.data.rows import collate, make_row
from titan_vlm.data.sample import ImageRef, RawSample, image_part, open_bytes, text_part
from titan_vlm.data.tokenizer import load_tokenizer
from titan_vlm.errors import ConfigError, DataError

V = 8
DATA = Data(virtual_shards=V, pack_window=4, min_pixels=1024)
CONFIG = Config(data=DATA, training=Training(seq_len=128))
SPEC = visual_spec(DATA)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def reference(tokenizer):
    """The first 40 rows of the run, made by one process."""
    loader = build_loader(CONFIG, tokenizer, SPEC)
    return [next(loader) for _ in range(40)]


def with_workers(workers):
    return dataclasses.replace(CONFIG, data=dataclasses.replace(DATA, num_workers=workers))


def assert_same(rows, expected):
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row.sample_ids == other.sample_ids
        for name in ("tokens_S", "labels_S", "positions_3S", "valid_S", "pixels_NC"):
            assert torch.equal(getattr(row, name), getattr(other, name)), name
        assert (row.doc_lens, row.grids, row.counts) == (other.doc_lens, other.grids, other.counts)


def interleaved(loaders, count):
    """The run's rows from the loaders of all ranks."""
    return [next(loaders[i % len(loaders)]) for i in range(count)]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (4, 0), (2, 2), (1, 4)])
def test_sequence_is_the_same_on_any_number_of_ranks_and_workers(
    reference, tokenizer, ranks, workers
):
    config = with_workers(workers)
    loaders = [build_loader(config, tokenizer, SPEC, rank, ranks) for rank in range(ranks)]
    assert_same(interleaved(loaders, 40), reference)


@pytest.mark.parametrize("stop", [0, 1, 7, 8, 13, 21])
def test_stopped_after_any_row_the_following_rows_are_identical(reference, tokenizer, stop):
    loader = build_loader(CONFIG, tokenizer, SPEC)
    for _ in range(stop):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    again = build_loader(CONFIG, tokenizer, SPEC)
    again.load_state_dict(state)
    assert_same([next(again) for _ in range(12)], reference[stop : stop + 12])


def test_with_workers_the_state_is_of_the_last_row_taken_not_of_what_they_read_ahead(
    reference, tokenizer
):
    for stop in (1, 6, 11):
        loader = build_loader(with_workers(2), tokenizer, SPEC)
        for _ in range(stop):
            next(loader)
        state = loader.state_dict()
        loader.close()
        # On other numbers of workers, and twice in a row.
        for workers in (2, 0, 4):
            again = build_loader(with_workers(workers), tokenizer, SPEC)
            again.load_state_dict(state)
            assert_same([next(again) for _ in range(9)], reference[stop : stop + 9])
            second = again.state_dict()
            again.close()
            last = build_loader(CONFIG, tokenizer, SPEC)
            last.load_state_dict(second)
            assert_same([next(last) for _ in range(3)], reference[stop + 9 : stop + 12])


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 2), (4, 4)])
def test_resumes_on_another_number_of_ranks(reference, tokenizer, before, after):
    loaders = [build_loader(CONFIG, tokenizer, SPEC, rank, before) for rank in range(before)]
    interleaved(loaders, 12)
    state = merge_states([loader.state_dict() for loader in loaders])
    again = [build_loader(CONFIG, tokenizer, SPEC, rank, after) for rank in range(after)]
    for loader in again:
        loader.load_state_dict(state)
    assert_same(interleaved(again, 20), reference[12:32])


def test_resuming_where_rows_do_not_divide_among_ranks_is_refused(tokenizer):
    loader = build_loader(CONFIG, tokenizer, SPEC)
    next(loader)
    with pytest.raises(ConfigError, match="divides global_batch_size"):
        build_loader(CONFIG, tokenizer, SPEC, 0, 2).load_state_dict(loader.state_dict())


def test_shards_that_do_not_divide_among_ranks_and_workers_are_refused(tokenizer):
    with pytest.raises(
        ConfigError, match="of 6 .* use data.num_workers = 2, or .*shards = 6 or 12"
    ):
        build_loader(with_workers(3), tokenizer, SPEC, 0, 2)


class TinySource:
    """A few samples; some with a picture that breaks when decoded, some too long for a row: for
    their question, so that nothing is left to learn from the first part, or for their answer."""

    def __init__(self, size, broken=(), bad=(), long_question=(), long_answer=()):
        self.size, self.broken, self.bad = size, broken, bad
        self.long_question, self.long_answer = long_question, long_answer

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        number = index % self.size
        if number in self.bad:
            raise DataError(f"tiny:{number}: malformed JSON")
        parts = [text_part(f"Number {number}?" + " and" * 99 * (number in self.long_question))]
        if number in self.broken:
            ref = ImageRef(f"{number}.jpg", partial(open_bytes, b"not an image"), size=(32, 32))
            parts.insert(0, image_part(ref))
        messages = [
            {"role": "user", "content": parts},
            {
                "role": "assistant",
                "content": [text_part(str(number) + " and" * 99 * (number in self.long_answer))],
            },
        ]
        return RawSample(str(index), messages, f"tiny:{number}")


def tiny_loader(tokenizer, source, workers=0, seed=0, **options):
    encoder = Encoder(tokenizer, SPEC)
    options = {"seq_len": 64, "virtual_shards": 4, "window": 3} | options
    mixture = Mixture([Member("tiny", source)], seed)
    return RowLoader(PackedRows(mixture, encoder, **options), workers)


def numbers(row):
    """(epoch, number) of each sample of a row of a tiny source."""
    return [tuple(map(int, id.removeprefix("tiny:").split(":"))) for id in row.sample_ids]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_of_every_epoch_is_seen_exactly_once(tokenizer, workers):
    loader = tiny_loader(tokenizer, TinySource(30), workers)
    seen = []
    while len(seen) < 200:
        seen += numbers(next(loader))
    loader.close()
    assert len(set(seen)) == len(seen)
    # Whatever the packing still holds back is the end: all of the first epochs are there.
    assert {(epoch, number) for epoch in range(4) for number in range(30)} <= set(seen)


def test_broken_picture_leaves_its_sample_out_of_the_row_and_is_counted(tokenizer, caplog):
    whole = tiny_loader(tokenizer, TinySource(20))
    loader = tiny_loader(tokenizer, TinySource(20, broken={3}))
    rows = [next(loader) for _ in range(12)]
    assert {number for row in rows for _, number in numbers(row)} == set(range(20)) - {3}
    assert sum(row.counts.bad for row in rows) >= 1
    assert not any(row.num_images or row.grids or len(row.pixels_NC) for row in rows)
    assert "skipped tiny:3: 3.jpg: broken image" in caplog.text
    assert sum(len(next(whole).sample_ids) for _ in range(12)) > 20
    for row in rows:
        assert sum(row.doc_lens) == 64
        assert row.valid_S.sum() == sum(row.doc_lens[: len(row.sample_ids)])


def test_loader_can_be_sent_to_a_worker_that_is_not_forked(reference, tokenizer):
    rows = pickle.loads(pickle.dumps(build_loader(CONFIG, tokenizer, SPEC).rows))
    again = RowLoader(rows)
    assert_same([next(again) for _ in range(3)], reference[:3])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_counts_bad_samples_and_keeps_examples_of_the_reasons(tokenizer, workers):
    loader = tiny_loader(tokenizer, TinySource(20, bad={5, 6}), workers)
    rows = [next(loader) for _ in range(60)]
    loader.close()
    assert loader.counts == sum((row.counts for row in rows), Counts())
    assert loader.counts.bad > loader.counts.seen / 20
    assert len(loader.reasons) == 3
    assert set(loader.reasons) <= {f"tiny:{k}: malformed JSON" for k in (5, 6)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_of_which_nothing_can_be_used_ends_the_run_with_the_reason(tokenizer, workers):
    loader = tiny_loader(tokenizer, TinySource(20, bad=range(20)), workers)
    with pytest.raises(
        DataError, match="^none of the first 100 samples .*; the last: tiny:.*: mal"
    ):
        next(loader)
    loader.close()


HARD = TinySource(
    41, broken={3, 30}, bad={5, 6, 23}, long_question={8, 29}, long_answer={1, 13, 14}
)


@pytest.mark.parametrize("overlong", ["drop", "cut"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (4, 2)])
def test_resumed_rows_and_counts_are_those_of_the_uninterrupted_run(
    tokenizer, overlong, before, after
):
    def make(ranks):
        options = {"overlong": overlong, "ranks": ranks}
        return [tiny_loader(tokenizer, HARD, rank=rank, **options) for rank in range(ranks)]

    whole = make(1)
    rows = interleaved(whole, 48)
    for stop in (4, 8, 28):
        loaders = make(before)
        interleaved(loaders, stop)
        state = merge_states([loader.state_dict() for loader in loaders])
        loaders = make(after)
        for loader in loaders:
            loader.load_state_dict(state)
        # Before any shard is at work again, and as soon as some are.
        for upto in (stop, stop + 2, 48):
            done = sum((row.counts for row in rows[:upto]), Counts())
            assert_same(interleaved(loaders, upto - stop), rows[stop:upto])
            assert sum((loader.counts for loader in loaders), Counts()) == done
            stop = upto
    assert whole[0].counts.bad and whole[0].counts.dropped
    assert bool(whole[0].counts.cut) == (overlong == "cut")


def test_a_sample_that_breaks_while_the_run_is_down_is_counted(tokenizer):
    loader = tiny_loader(tokenizer, TinySource(200))
    first = next(loader)
    state = loader.state_dict()
    _, waiting = loader.rows.mixture.place(*state["shards"][0]["pending"][0])
    again = tiny_loader(tokenizer, TinySource(200, bad={waiting}))
    again.load_state_dict(state)
    assert again.counts == first.counts
    rows = [next(again) for _ in range(4)]
    assert rows[3].counts.bad == again.counts.bad == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"virtual_shards": 8}, "data.virtual_shards = 8, .* began with 4 .* go back to 4"),
        ({"seq_len": 32}, "training.seq_len = 32, .* began with 64"),
        ({"seed": 7}, "run.seed = 7, .* began with 0"),
        ({"source": TinySource(31)}, "number of samples in data.path = 31, .* began with 30"),
    ],
)
def test_resuming_what_would_be_another_sequence_is_refused(tokenizer, change, said):
    loader = tiny_loader(tokenizer, TinySource(30))
    next(loader)
    again = tiny_loader(tokenizer, **{"source": TinySource(30)} | change)
    with pytest.raises(ConfigError, match=said):
        again.load_state_dict(merge_states([loader.state_dict()]))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_rows_draws_nothing_from_the_random_generators_of_the_run(tokenizer, workers):
    def states():
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]

    before = states()
    loader = tiny_loader(tokenizer, TinySource(20), workers)
    for _ in range(3):
        next(loader)
    loader.close()
    assert states() == before


def bad_run(output, path, **changes):
    """Exit status of a run on JSONL; and in a process of its own, for several ranks."""
    data = {"data__source": "openai", "data__path": path, "training__steps": "40"}
    return run(output, **data | changes)


@pytest.fixture
def tenth_bad(tmp_path):
    """JSONL of 60 conversations with a malformed line in each ten."""
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    good = json.dumps({"messages": turns})
    path = tmp_path / "talks.jsonl"
    path.write_text("".join("{\n" if k % 10 == 3 else good + "\n" for k in range(60)))
    return str(path)


def test_too_many_bad_samples_end_the_run_at_the_same_step_anyhow(
    world, tmp_path, tenth_bad, capfd
):
    assert bad_run(tmp_path / "whole", tenth_bad) == 2
    reason = rf"error: \d+ of \d+ samples are bad, .*max_bad_fraction = 0.01 .*{tenth_bad}:\d*4: "
    (error,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error")]
    assert re.match(reason, error)
    end = curve(tmp_path / "whole")[-1][0]
    assert 4 < end < 40
    data = {"data__source": "openai", "data__path": tenth_bad, "training__steps": "40"}
    run_killed(tmp_path / "killed", step=4, **data)
    assert bad_run(tmp_path / "killed", tenth_bad, data__num_workers="2") == 2
    assert curve(tmp_path / "killed")[-1][0] == end
    assert world.run(2, bad_run, tmp_path / "two", tenth_bad) == [2, 2]
    assert curve(tmp_path / "two")[-1][0] == end
    allowed = {"data__max_bad_fraction": "0.2", "training__steps": str(end + 1)}
    assert bad_run(tmp_path / "allowed", tenth_bad, **allowed) == 0


def test_rows_and_batches_have_the_layout_that_models_read(reference, tokenizer):
    batch = collate(reference[:3])
    assert batch.tokens_BS.shape == batch.labels_BS.shape == batch.valid_BS.shape == (3, 128)
    assert batch.positions_3BS.shape == (3, 3, 128)
    assert sum(batch.doc_lens) == 3 * 128
    assert batch.num_samples == sum(len(row.sample_ids) for row in reference[:3])
    assert batch.num_images == len(batch.grids)
    patches = sum(t * h * w for t, h, w in batch.grids)
    assert batch.pixels_NC.shape == (patches, SPEC.patch_dim)
    assert batch.pixels_NC.dtype == torch.float32
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(batch.visual_index_M, (batch.tokens_BS.flatten() == image).nonzero()[:, 0])
    assert len(batch.visual_index_M) == patches // SPEC.merge_size**2
    at = 0
    flat = batch.positions_3BS.permute(1, 2, 0).reshape(-1, 3)
    tokens, labels = batch.tokens_BS.flatten(), batch.labels_BS.flatten()
    for length in batch.doc_lens:
        assert flat[at].tolist() == [0, 0, 0]  # positions begin anew in every document
        assert labels[at + length - 1] == -100  # no target beyond its own document
        inside = labels[at : at + length - 1]
        trained = inside != -100
        assert torch.equal(inside[trained], tokens[at + 1 : at + length][trained])
        at += length
    padding = ~batch.valid_BS
    assert (batch.labels_BS[padding] == -100).all()
    assert (batch.tokens_BS[padding] == tokenizer.pad_token_id).all()


def test_packing_wastes_little(reference):
    used = sum(row.valid_S.sum().item() for row in reference)
    assert used / (len(reference) * 128) > 0.9


def colored(name, colors, broken=False):
    """A conversation about pictures of one colour each."""
    pictures = [
        image_part(ImageRef(color, partial(Image.new, "RGB", (32, 32), color), size=(32, 32)))
        for color in colors
    ]
    if broken:
        ref = ImageRef("broken", partial(open_bytes, b"not an image"), size=(32, 32))
        pictures.append(image_part(ref))
    messages = [
        {"role": "user", "content": [*pictures, text_part("?")]},
        {"role": "assistant", "content": [text_part("!")]},
    ]
    return RawSample(name, messages, name)


def test_pictures_of_a_row_stay_with_their_samples(tokenizer):
    encoder = Encoder(tokenizer, SPEC)
    raws = [
        colored("a", ["black", "gray"]),
        colored("b", ["silver"], broken=True),
        colored("c", ["white"]),
    ]
    samples = [encoder.encode(raw) for raw in raws]
    row = make_row(samples, 128, encoder, on_broken=lambda sample, error: None)
    assert row.sample_ids == ["a", "c"]
    whole = [visual for sample in (samples[0], samples[2]) for visual in sample.visuals]
    expected = np.concatenate([visual.pixels(SPEC) for visual in whole])
    assert np.array_equal(row.pixels_NC.numpy(), expected)
    assert len(np.unique(expected.mean(1))) == 3  # the colours can be told apart
    assert row.num_images == len(row.grids) == collate([row]).num_images == 3


def test_a_broken_picture_without_a_handler_is_an_error(tokenizer):
    encoder = Encoder(tokenizer, SPEC)
    sample = encoder.encode(TinySource(5, broken={1})[1])
    with pytest.raises(DataError, match="1.jpg: broken image"):
        make_row([sample], 64, encoder)
