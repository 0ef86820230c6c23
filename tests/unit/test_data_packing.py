"""Packing: first-fit in a window, nothing lost silently, state small and sufficient."""

import numpy as np
import pytest

from titan_vlm.data.chat import Sample
from titan_vlm.data.mixture import EpochOrder, Member, Mixture
from titan_vlm.data.packing import Counts, Shard
from titan_vlm.errors import DataError


def sample(number, length):
    tokens = np.full(length, number)
    labels = np.ones(length, dtype=np.int64)
    positions = np.tile(np.arange(length), (3, 1))
    return Sample(str(number), f"f:{number}", tokens, labels, positions, np.zeros(length, bool), [])


def shard_of_one(number, shards, fetch, **options):
    """A shard of one source, which is given by position."""
    mixture = Mixture([Member("f", range(10_000))])
    return Shard(number, shards, mixture, lambda member, position: fetch(position), **options)


def lengths(*values):
    """A source whose k-th sample has the k-th length, over and over."""
    return lambda position: sample(position, values[position % len(values)])


def ids(row):
    return [int(s.id) for s in row]


def test_first_fit_takes_the_oldest_first_and_fills_the_rest_in_order():
    shard = shard_of_one(0, 1, lengths(5, 4, 2, 1, 3, 6), seq_len=8, window=3)
    assert ids(shard.next_row()) == [0, 2, 3]  # 5, 4 does not fit, 2, then 1 has moved up
    assert ids(shard.next_row()) == [1, 4]  # 4 was the oldest; 3 fits
    assert ids(shard.next_row())[0] == 5


def test_no_sample_waits_for_ever_and_none_is_seen_twice():
    values = [7, 3, 3, 2, 2, 1, 6, 5, 8, 1]
    shard = shard_of_one(0, 1, lengths(*values), seq_len=8, window=4)
    emitted = [k for _ in range(200) for k in ids(shard.next_row())]
    assert len(set(emitted)) == len(emitted)
    waiting = {position for _, position, _ in shard.pending}
    assert set(emitted) | waiting == set(range(max(emitted) + 1)) | waiting
    assert all(abs(place - k) < 8 for place, k in enumerate(emitted))


def test_shards_take_every_vth_sample_of_the_order():
    for number in range(3):
        shard = shard_of_one(number, 3, lengths(4), seq_len=8, window=2)
        assert ids(shard.next_row() + shard.next_row()) == [
            number,
            number + 3,
            number + 6,
            number + 9,
        ]


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_state_restores_the_following_rows_and_counts_after_any_row(overlong):
    def fetch(position):
        if position % 11 == 7:
            raise DataError(f"f:{position}: bad")
        return lengths(5, 4, 2, 1, 3, 6, 9)(position)

    def make():
        return shard_of_one(1, 2, fetch, seq_len=8, window=4, overlong=overlong)

    def next_row(shard):
        return [(s.id, len(s)) for s in shard.next_row()], shard.counts[0].as_list()

    shard = make()
    states, rows = [], []
    for _ in range(30):
        states.append(shard.state_dict())
        rows.append(next_row(shard))
    counts = shard.counts[0]
    assert counts.bad and (counts.cut if overlong == "cut" else counts.dropped)
    for k in range(27):
        again = make()
        again.load_state_dict(states[k])
        assert [next_row(again) for _ in range(3)] == rows[k : k + 3]
        assert len(states[k]["pending"]) <= 4


def test_overlong_samples_are_dropped_and_counted_or_cut_and_counted():
    dropping = shard_of_one(0, 1, lengths(3, 9), seq_len=8, window=2)
    assert ids(dropping.next_row()) == [0, 2]
    assert dropping.counts[0].dropped >= 1 and dropping.counts[0].cut == 0
    cutting = shard_of_one(0, 1, lengths(9), seq_len=8, window=2, overlong="cut")
    assert [len(s) for s in cutting.next_row()] == [8]
    assert cutting.counts[0].cut >= 1 and cutting.counts[0].dropped == 0


def test_source_of_which_nothing_fits_ends_with_an_error_instead_of_searching_for_ever():
    with pytest.raises(
        DataError, match="none of the first 100 samples.*9 tokens.*seq_len = 8: rai"
    ):
        shard_of_one(0, 1, lengths(9), seq_len=8).next_row()


def partly(is_good):
    """A source whose other samples are bad and too long in turn."""

    def fetch(position):
        if is_good(position):
            return sample(position, 4)
        if position % 2:
            raise DataError(f"f:{position}: malformed JSON")
        return sample(position, 9)

    return fetch


def test_bad_and_overlong_samples_together_are_nothing_to_use_either():
    with pytest.raises(DataError, match="none of the first 100 samples.*f:99: malformed JSON"):
        shard_of_one(0, 1, partly(lambda position: False), seq_len=8).next_row()


def test_a_source_that_breaks_on_the_way_ends_with_an_error_too():
    shard = shard_of_one(0, 1, partly(lambda position: position < 20), seq_len=8, window=2)
    with pytest.raises(DataError, match="none of the last 1000 samples can be used.*f:1019: malf"):
        for _ in range(20):
            shard.next_row()


def test_a_source_of_which_little_can_be_used_is_searched_on():
    shard = shard_of_one(0, 1, partly(lambda position: position % 700 == 5), seq_len=8, window=2)
    assert [ids(shard.next_row()) for _ in range(3)] == [[5, 705], [1405, 2105], [2805, 3505]]


def test_bad_samples_are_skipped_counted_and_logged_with_their_line(caplog):
    def fetch(position):
        if position == 1:
            raise DataError("train.jsonl:2: malformed JSON")
        return sample(position, 4)

    shard = shard_of_one(0, 1, fetch, seq_len=8, window=2)
    assert ids(shard.next_row()) == [0, 2]
    assert shard.counts[0].bad == 1
    assert "skipped train.jsonl:2: malformed JSON" in caplog.text


@pytest.mark.parametrize(
    ("seen", "bad", "fraction", "too_many"),
    [
        (99, 50, 0.01, False),  # too few to tell
        (100, 2, 0.01, False),  # more than 1 %, as chance has it
        (100, 5, 0.01, True),
        (100_000, 1010, 0.01, False),
        (100_000, 1100, 0.01, True),  # the more were seen, the nearer to the limit
        (100_000, 90_010, 0.9, False),
        (100_000, 90_400, 0.9, True),
        (3, 1, 0.0, True),  # none is allowed
        (10_000, 10_000, 1.0, False),
    ],
)
def test_too_many_are_bad_where_chance_does_not_explain_it(seen, bad, fraction, too_many):
    assert Counts(seen=seen, bad=bad).too_many_bad(fraction) is too_many


def test_a_run_far_below_the_limit_is_never_taken_for_one_above_it():
    is_bad = np.random.default_rng(0).random((200, 5000)) < 0.004
    bad = is_bad.cumsum(1)
    seen = np.arange(1, 5001)
    for run in bad:
        looks = zip(seen[::8], run[::8], strict=True)
        assert not any(Counts(s, b).too_many_bad(0.01) for s, b in looks)


def test_every_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    order, again, other = EpochOrder(50, 3), EpochOrder(50, 3), EpochOrder(50, 4)
    first, second = ([order[j] for j in range(e * 50, e * 50 + 50)] for e in (0, 1))
    assert sorted(first) == list(range(50)) and sorted(second) == list(range(50, 100))
    assert first != [k - 50 for k in second]
    assert [again[j] for j in (75, 3)] == [order[75], order[3]]  # no need to have come by
    assert [other[j] for j in range(50)] != first
