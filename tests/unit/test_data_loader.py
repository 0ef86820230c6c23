"""The run's one sequence of rows, whoever makes it and wherever it was interrupted."""

import dataclasses
import json
import pickle
from functools import partial

import pytest
import torch

from titan_vlm.config import Config, Data, Training
from titan_vlm.data.chat import Encoder
from titan_vlm.data.images import visual_spec
from titan_vlm.data.loader import PackedRows, RowLoader, build_loader, merge_states
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
    with pytest.raises(ConfigError, match="no multiple of 6.*use 6 or 12, or data.num_workers = 2"):
        build_loader(with_workers(3), tokenizer, SPEC, 0, 2)


class TinySource:
    """A few samples; some with a picture that breaks when decoded."""

    def __init__(self, size, broken=(), bad=()):
        self.size, self.broken, self.bad = size, broken, bad

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        number = index % self.size
        if number in self.bad:
            raise DataError(f"tiny:{number}: malformed JSON")
        parts = [text_part(f"Number {number}?")]
        if number in self.broken:
            ref = ImageRef(f"{number}.jpg", partial(open_bytes, b"not an image"), size=(32, 32))
            parts.insert(0, image_part(ref))
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [text_part(str(number))]},
        ]
        return RawSample(str(index), messages, f"tiny:{number}")


def tiny_loader(tokenizer, source, workers=0, **options):
    encoder = Encoder(tokenizer, SPEC)
    options = {"seq_len": 64, "virtual_shards": 4, "window": 3} | options
    return RowLoader(PackedRows(source, encoder, **options), workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_of_every_epoch_is_seen_exactly_once(tokenizer, workers):
    loader = tiny_loader(tokenizer, TinySource(30), workers)
    seen = []
    while len(seen) < 200:
        seen += map(int, next(loader).sample_ids)
    loader.close()
    assert len(set(seen)) == len(seen)
    # Whatever the packing still holds back is the end: all of the first epochs are there.
    assert set(range(4 * 30)) <= set(seen)


def test_broken_picture_leaves_its_sample_out_of_the_row_and_is_counted(tokenizer, caplog):
    whole = tiny_loader(tokenizer, TinySource(20), max_bad_fraction=1.0)
    loader = tiny_loader(tokenizer, TinySource(20, broken={3}), max_bad_fraction=1.0)
    rows = [next(loader) for _ in range(12)]
    ids = {int(k) % 20 for row in rows for k in row.sample_ids}
    assert ids == set(range(20)) - {3}
    assert sum(row.counts.bad for row in rows) >= 1
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
def test_too_many_bad_samples_end_the_run_with_the_reason(tokenizer, workers):
    loader = tiny_loader(tokenizer, TinySource(20, bad={5, 6}), workers)
    reason = r"^\d+ of \d+ samples are bad, .*max_bad_fraction = 0.01 allows; the last: tiny:.: mal"
    with pytest.raises(DataError, match=reason):
        for _ in range(200):
            next(loader)
    loader.close()


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


def test_a_broken_picture_without_a_handler_is_an_error(tokenizer):
    encoder = Encoder(tokenizer, SPEC)
    sample = encoder.encode(TinySource(5, broken={1})[1])
    with pytest.raises(DataError, match="1.jpg: broken image"):
        make_row([sample], 64, encoder)
