"""Several sources in one sequence of rows: shares, epochs, resuming, and what is refused."""

import json
from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
import torch

from titan_vlm.data.chat import Encoder, Sample
from titan_vlm.data.config import Data, Source
from titan_vlm.data.images import visual_spec
from titan_vlm.data.loader import PackedRows, RowLoader, merge_states
from titan_vlm.data.mixture import EpochOrder, Member, Mixture, Turns, build_mixture
from titan_vlm.data.packing import Shard
from titan_vlm.data.rows import collate
from titan_vlm.data.sample import RawSample, text_part
from titan_vlm.data.tokenizer import load_tokenizer
from titan_vlm.errors import ConfigError, DataError
from titan_vlm.training.by_source import source_of_tokens

SPEC = visual_spec(Data(min_pixels=1024))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


# ---------------------------------------------------------------------------- shares

WEIGHTS = {"a": 61.0, "b": 25.0, "c": 13.0, "rare": 1.0}
LENGTHS = {"a": (3, 20), "b": (20, 60), "c": (1, 5), "rare": (2, 30)}


def samples_of(mixture, member, position):
    """A sample whose length follows from its id."""
    name = mixture.members[member].name
    low, high = LENGTHS[name]
    length = low + (position * 7919 + member * 104729) % (high - low)
    flat = np.ones(length, dtype=np.int64)
    positions = np.tile(np.arange(length), (3, 1))
    none = np.zeros(length, bool)
    id = mixture.id(member, position)
    return Sample(id, id, flat, flat, positions, none, [], source=member)


def emitted(mixture, shards, seq_len=64):
    """Samples in the order of the run's rows."""
    made = [
        Shard(k, shards, mixture, lambda *place: samples_of(mixture, *place), seq_len, window=16)
        for k in range(shards)
    ]
    while True:
        for shard in made:
            yield from shard.next_row()


@pytest.mark.parametrize("by", ["samples", "tokens"])
def test_shares_hold_over_any_ten_thousand_samples(by):
    members = [Member(name, range(997), weight) for name, weight in WEIGHTS.items()]
    taken = list(islice(emitted(Mixture(members, 0, by), 16), 40_000))
    source_N = np.array([sample.source for sample in taken])
    amount_N = np.array([len(sample) if by == "tokens" else 1 for sample in taken])
    total_N = np.concatenate([[0], amount_N.cumsum()])
    for k, weight in enumerate(WEIGHTS.values()):
        mine_N = np.concatenate([[0], (amount_N * (source_N == k)).cumsum()])
        windows = (mine_N[10_000:] - mine_N[:-10_000]) / (total_N[10_000:] - total_N[:-10_000])
        assert abs(windows - weight / 100).max() < 0.005


def test_a_shard_chooses_what_exact_arithmetic_over_all_it_has_taken_would():
    weights, shards = [5, 3, 2], 8
    mixture = Mixture([Member(str(w), range(50), w) for w in weights], 0, "samples")
    for number in (0, 3, 7):
        turns = Turns(mixture, number, shards)
        start = [Fraction(credit) for credit in turns.credits]
        assert abs(sum(start)) < 1e-9 and max(map(abs, start)) < 1
        taken = [0, 0, 0]
        for n in range(500):
            due = [Fraction(w, 10) * (n + 1) - taken[k] + start[k] for k, w in enumerate(weights)]
            member, position = turns.next()
            # Sums of rounded numbers may tell two equals apart.
            assert due[member] >= max(due) - Fraction(1, 10**9)
            assert position == number + shards * taken[member]
            turns.take(member, 1)
            taken[member] += 1


def test_shards_do_not_come_to_a_rare_source_all_at_once():
    members = [Member("often", range(1000), 99), Member("rare", range(1000), 1)]
    mixture = Mixture(members, 0, "samples")
    turns = [Turns(mixture, number, 16) for number in range(16)]
    found = []
    for _ in range(500):
        for turn in turns:
            member, _ = turn.next()
            turn.take(member, 1)
            found.append(member)
    counts = np.convolve(found, np.ones(400), mode="valid")  # 4 expected
    assert counts.min() >= 2 and counts.max() <= 7


def test_numbers_of_samples_are_shares_and_temperature_evens_them_out(tmp_path):
    sizes = {"big": 90, "small": 10}
    tables = [
        Source(name=name, source="openai", path=talks(tmp_path, name, n))
        for name, n in sizes.items()
    ]

    def shares(**options):
        return list(
            Turns(build_mixture(Data(sources=tables, **options), 0), 0, 4).shares().values()
        )

    assert shares() == [0.9, 0.1]
    assert shares(mixture_temperature=2.0) == pytest.approx([0.75, 0.25])
    assert shares(mixture_temperature=1e9) == pytest.approx([0.5, 0.5])


def talks(folder, name, number):
    """JSONL of conversations."""
    path = folder / f"{name}.jsonl"
    with path.open("w") as file:
        for k in range(number):
            turns = [
                {"role": "user", "content": f"{name}?"},
                {"role": "assistant", "content": f"{k}." * (1 + k % 5)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return str(path)


# ---------------------------------------------------------------------------- orders


def test_the_first_source_has_the_order_of_a_single_one_and_equal_sources_have_different_ones():
    orders = [EpochOrder(40, 3, member) for member in (0, 1)]
    alone = np.random.Generator(np.random.PCG64([3, 2])).permutation(40)
    assert [orders[0][80 + k] - 80 for k in range(40)] == alone.tolist()
    assert [orders[1][80 + k] - 80 for k in range(40)] != alone.tolist()


def test_an_order_read_in_three_epochs_in_turn_is_the_same():
    order, again = EpochOrder(9, 0), EpochOrder(9, 0)
    inside = [order[j] for j in range(27)]
    mixed = sorted(range(27), key=lambda j: (j % 9, j))
    assert [again[j] for j in mixed] == [inside[j] for j in mixed]


# ---------------------------------------------------------------------------- rows


class Numbers:
    """Conversations about a number; some cannot be used."""

    def __init__(self, name, size, bad=(), words=1):
        self.name, self.size, self.bad, self.words = name, size, bad, words

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        number = index % self.size
        if number in self.bad:
            raise DataError(f"{self.name}.jsonl:{number + 1}: malformed JSON")
        answer = f"{index}" + " and" * (number % 3 * self.words)
        return RawSample(
            "",
            [
                {"role": "user", "content": [text_part(f"{self.name}?")]},
                {"role": "assistant", "content": [text_part(answer)]},
            ],
            f"{self.name}.jsonl:{number + 1}",
        )


def three(**changes):
    """A mixture in which one source ends early and one has samples that cannot be used."""
    by = changes.pop("by", "samples")
    members = {
        "a": Member("a", Numbers("a", 31, bad={4}), 0.5),
        "b": Member("b", Numbers("b", 5, words=9), 0.3),
        "c": Member("c", Numbers("c", 17), 0.2, epochs=2),
    }
    return Mixture(list((members | changes).values()), 0, by)


def loader(tokenizer, mixture, rank=0, ranks=1, workers=0):
    rows = PackedRows(
        mixture,
        Encoder(tokenizer, SPEC),
        seq_len=96,
        virtual_shards=8,
        window=3,
        rank=rank,
        ranks=ranks,
    )
    return RowLoader(rows, workers)


def assert_same(rows, expected):
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        for name in ("tokens_S", "labels_S", "positions_3S", "valid_S", "pixels_NC"):
            assert torch.equal(getattr(row, name), getattr(other, name)), name
        for name in ("sample_ids", "origins", "sources", "doc_lens", "counts_of", "skipped"):
            assert getattr(row, name) == getattr(other, name), name


def epochs_done(ids):
    """By epoch of a source, the numbers of its samples."""
    found = {}
    for id in ids:
        epoch, number = id.rsplit(":", 1)
        found.setdefault(epoch, []).append(int(number))
    return found


SIZES = {"a": 31, "b": 5, "c": 17}


@pytest.fixture(scope="module", params=["samples", "tokens"])
def whole(request, tokenizer):
    """(by, 176 rows in one go)."""
    alone = loader(tokenizer, three(by=request.param))
    return request.param, [next(alone) for _ in range(176)]


def test_every_sample_of_every_epoch_of_every_source_is_met_exactly_once(whole):
    _, rows = whole
    used = [id for row in rows for id in row.sample_ids]
    left_out = [id for row in rows for id in row.skipped]
    found = epochs_done(used + left_out)
    assert all(len(set(numbers)) == len(numbers) for numbers in found.values())
    assert {id.split(":")[2] for id in left_out} == {"4"}  # what is bad, in every epoch
    assert {id.split(":")[0] for id in left_out} == {"a"}
    # What is still in a window, or ahead of a shard behind the others, is of the last epochs.
    for name, size in SIZES.items():
        epochs = sorted(int(key.split(":")[1]) for key in found if key.startswith(f"{name}:"))
        complete = [e for e in epochs if len(found[f"{name}:{e}"]) == size]
        assert complete[: len(epochs) * 2 // 3] == epochs[: len(epochs) * 2 // 3]
        assert len(complete) >= 2
    assert max(int(key.split(":")[1]) for key in found if key.startswith("c:")) == 1


def seams(rows):
    """Rows in which an epoch of some source begins."""
    seen, found = set(), []
    for i, row in enumerate(rows):
        epochs = {id.rsplit(":", 1)[0] for id in row.sample_ids}
        if epochs - seen:
            found.append(i)
        seen |= epochs
    return found


# Ranks and workers of four parts of a run.
PARTS = [
    [(1, 0), (2, 2), (4, 0), (1, 2)],
    [(4, 0), (1, 0), (2, 0), (4, 2)],
    [(2, 2), (4, 0), (2, 0), (1, 0)],
]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("stops", [(4, 24, 56, 76), (36, 40, 44, 76)])
def test_resumed_three_times_on_other_ranks_and_workers_the_rows_are_the_same(
    whole, tokenizer, parts, stops
):
    by, rows = whole
    state, at, got = None, 0, []
    for (ranks, workers), stop in zip(parts, stops, strict=True):
        loaders = [loader(tokenizer, three(by=by), r, ranks, workers) for r in range(ranks)]
        if state is not None:
            for each in loaders:
                each.load_state_dict(state)
        got += [next(loaders[i % ranks]) for i in range(at, stop)]
        state = json.loads(json.dumps(merge_states([each.state_dict() for each in loaders])))
        at = stop
        for each in loaders:
            each.close()
    assert_same(got, rows[: stops[-1]])


@pytest.mark.parametrize("by", ["samples", "tokens"])
def test_a_shard_that_was_restored_has_the_state_that_it_was_given(by):
    members = [Member(name, range(97), weight) for name, weight in WEIGHTS.items()]

    def make():
        mixture = Mixture(members, 0, by)
        return Shard(3, 8, mixture, lambda *place: samples_of(mixture, *place), 64, window=16)

    shard = make()
    for _ in range(40):
        shard.next_row()
        again = make()
        again.load_state_dict(shard.state_dict())
        assert again.state_dict() == shard.state_dict()
        assert {member for member, _ in shard.state_dict()["pending"]} != {0}


def test_resumed_at_a_row_in_which_an_epoch_begins_the_rows_are_the_same(whole, tokenizer):
    by, rows = whole
    around = sorted({i + d for i in seams(rows) for d in (0, 1) if 0 < i + d < 170})
    assert len(around) > 10
    alone = loader(tokenizer, three(by=by))
    states = {}
    for i in range(around[-1] + 1):
        states[i] = json.dumps(alone.state_dict())
        next(alone)
    for i in around[::3]:
        again = loader(tokenizer, three(by=by))
        again.load_state_dict(json.loads(states[i]))
        assert_same([next(again) for _ in range(6)], rows[i : i + 6])


@pytest.mark.parametrize("end", [{"epochs": 1}, {"limit": 11}, {"epochs": 3, "limit": 5}])
def test_a_source_at_its_end_leaves_its_share_to_the_others_in_proportion(tokenizer, end):
    members = [
        Member("a", Numbers("a", 40), 0.3),
        Member("b", Numbers("b", 40), 0.1),
        Member("c", Numbers("c", 8), 0.6, **end),
    ]
    assert members[2].extent == {1: "1 x 8", 0: "11", 3: "5"}[end.get("epochs", 0)]
    alone = loader(tokenizer, Mixture(members, 0, "samples"))
    names = [id[0] for _ in range(120) for id in next(alone).sample_ids]
    assert names.count("c") == end.get("limit", 8) and "c" not in names[60:]
    after = Counter(names[60:])
    assert after["a"] / (after["a"] + after["b"]) == pytest.approx(0.75, abs=0.02)


def test_a_source_of_which_half_is_bad_has_its_share_of_what_is_used(tokenizer):
    half = Member("a", Numbers("a", 40, bad=range(0, 40, 2)), 1)
    other = Member("b", Numbers("b", 40), 1)
    alone = loader(tokenizer, Mixture([half, other], 0, "samples"))
    names = Counter(id[0] for _ in range(60) for id in next(alone).sample_ids)
    assert names["a"] / names.total() == pytest.approx(0.5, abs=0.02)


def test_every_token_of_a_batch_knows_its_source(tokenizer):
    alone = loader(tokenizer, three())
    rows = [next(alone) for _ in range(4)]
    source_BS = source_of_tokens(collate(rows))
    seen = set()
    for row, source_S in zip(rows, source_BS.tolist(), strict=True):
        at = 0
        for id, length in zip(row.sample_ids, row.doc_lens, strict=False):
            assert {"abc"[k] for k in source_S[at : at + length]} == {id[0]}
            seen.add(id[0])
            at += length
    assert seen == set("abc")


def test_when_all_epochs_are_read_every_sample_was_met_and_rows_are_empty(tokenizer):
    members = [
        Member("a", Numbers("a", 29, bad={7}), 3, epochs=2),
        Member("b", Numbers("b", 3), 1, limit=12),
    ]
    alone = loader(tokenizer, Mixture(members, 0, "samples"), workers=2)
    rows = [next(alone) for _ in range(60)]
    alone.close()
    used = [id for row in rows for id in row.sample_ids + row.skipped]
    expected = [f"a:{e}:{k}" for e in range(2) for k in range(29)]
    expected += [f"b:{e}:{k}" for e in range(4) for k in range(3)]
    assert sorted(used) == sorted(expected)
    assert rows[-1].ended and not rows[-1].valid_S.any() and rows[-1].doc_lens == [96]
    assert [row.ended for row in rows] == [not row.sample_ids for row in rows]
    assert alone.ended >= 8
    counts = alone.counts_of
    assert [c.samples for c in counts] == [56, 12] and [c.bad for c in counts] == [2, 0]
    tokens = sum(int(row.valid_S.sum()) for row in rows)
    assert sum(c.tokens for c in counts) == tokens


# ---------------------------------------------------------------------------- resuming otherwise


def test_new_weights_and_epochs_go_on_from_where_the_sources_are(tokenizer):
    alone = loader(tokenizer, three())
    before = [id for _ in range(40) for id in next(alone).sample_ids]
    changed = {
        "a": Member("a", Numbers("a", 31, bad={4}), 0.1),
        "b": Member("b", Numbers("b", 5, words=9), 0.1),
        "c": Member("c", Numbers("c", 17), 0.8, epochs=9),
    }
    again = loader(tokenizer, three(**changed))
    again.load_state_dict(alone.state_dict())
    later = [next(again) for _ in range(60)]
    after = [id for row in later for id in row.sample_ids]
    both = before + after
    assert len(set(both)) == len(both)
    found = epochs_done(both)
    assert all(len(found[f"c:{epoch}"]) == 17 for epoch in range(3))
    # No long catching up: the first rows already have the new shares.
    names = Counter(id[0] for id in after[40:140])
    assert names["c"] / 100 == pytest.approx(0.8, abs=0.08)


def test_data_that_moved_are_taken_for_the_same_and_it_is_said(tokenizer, caplog):
    here = Member("b", Numbers("b", 5, words=9), 0.3, path="/here/b")
    there = Member("b", Numbers("b", 5, words=9), 0.3, path="/there/b")
    alone = loader(tokenizer, three(b=here))
    next(alone)
    again = loader(tokenizer, three(b=there))
    again.load_state_dict(alone.state_dict())
    assert caplog.messages == [
        "the run began with b at /here/b; /there/b is taken for the same samples"
    ]


def order(*names):
    members = {m.name: m for m in three().members}
    return Mixture([members[name] for name in names], 0, "samples")


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        (order("b", "a", "c"), "^data.sources = b, a, c, but .* began with a, b, c and its"),
        (order("a", "b"), "^data.sources = a, b, but .* go back to a, b, c, or use another"),
        (
            three(c=Member("d", Numbers("c", 17), 0.2, epochs=2)),
            "^data.sources = a, b, d, but .* began with a, b, c",
        ),
        (
            three(b=Member("b", Numbers("b", 6), 0.3)),
            r"^number of samples in data.sources\[1\].path = 6, but .* began with 5",
        ),
        (three(by="tokens"), "^data.mixture_by = tokens, but .* began with samples"),
        (
            Mixture([Member("openai", Numbers("a", 31))]),
            r"^\[data\] = source openai, but .* began with sources a, b, c and its .* go back to "
            "sources a, b, c, or use another",
        ),
    ],
)
def test_another_mixture_is_refused_and_says_what_is_different(tokenizer, mixture, said):
    alone = loader(tokenizer, three())
    next(alone)
    with pytest.raises(ConfigError, match=said):
        loader(tokenizer, mixture).load_state_dict(alone.state_dict())


def test_a_source_that_cannot_be_opened_is_named_by_its_table(tmp_path):
    good = Source("openai", talks(tmp_path, "a", 3), name="a")
    nowhere = Source("openai", str(tmp_path / "none.jsonl"), name="b")
    with pytest.raises(ConfigError, match=r"^data.sources\[1\].path: .*none.jsonl: no such file"):
        build_mixture(Data(sources=[good, nowhere]), 0)
    empty = Source("openai", talks(tmp_path, "c", 0), name="c")
    with pytest.raises(DataError, match=r'^data.sources\[1\].path = ".*c.jsonl": no samples in it'):
        build_mixture(Data(sources=[good, empty]), 0)
    with pytest.raises(DataError, match=r'^data.path = ".*c.jsonl": no samples in it'):
        build_mixture(Data(source="openai", path=empty.path), 0)
