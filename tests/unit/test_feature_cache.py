"""Features of a frozen vision tower on disk: the same numbers, and what need not be computed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.curriculum_run import stages_toml
from tests.small_run import curve, run, small_config
from titan_vlm import train
from titan_vlm.errors import ConfigError
from titan_vlm.models.init import init_weights
from titan_vlm.models.inputs import IGNORE_LABEL, Batch
from titan_vlm.models.omni.config import FLAVORS
from titan_vlm.models.omni.model import Omni
from titan_vlm.models.projector import Projector
from titan_vlm.stages import make_stages
from titan_vlm.training import feature_cache

ALONE = SimpleNamespace(tp=None, tokens=None, root=SimpleNamespace(device_type="cpu"))
GRIDS = [(1, 4, 6), (3, 2, 2), (1, 2, 4), (1, 2, 2)]


def settings(directory, **changes):
    return {
        "model__name": "omni",
        "model__flavor": "debug",
        "projector__levels": "1:0,pooled:1",
        "moe__text__experts": "0",
        "training__dtype": "float64",
        "training__freeze": "vision",
        "training__steps": "2",
        "schedule__warmup_steps": "0",
        "checkpoint__export_hf": "false",
        "data__feature_cache": str(directory),
    } | changes


def model_of(seed=0):
    projector = Projector(reduction="merge", levels=["1:0", "pooled:1"])
    config = replace(FLAVORS["debug"], projector=projector)
    model = Omni(replace(config, vision=replace(config.vision, merge_size=2))).double()
    init_weights(model, seed, 0.2)
    model.vision.requires_grad_(False)
    return model


def batch_of(chosen):
    """Pictures by their numbers; each number has its own pixels."""
    grids = [GRIDS[i] for i in chosen]
    size = FLAVORS["debug"].vision.patch_dim
    pixels = [
        torch.randn(t * h * w, size, generator=torch.Generator().manual_seed(i))
        for i, (t, h, w) in zip(chosen, grids, strict=True)
    ]
    tokens = torch.zeros(1, 4, dtype=torch.long)
    return Batch(
        tokens,
        torch.full_like(tokens, IGNORE_LABEL),
        torch.zeros(3, 1, 4, dtype=torch.long),
        torch.ones(1, 4, dtype=torch.bool),
        doc_lens=[4],
        pixels_NC=torch.cat([torch.empty(0, size), *pixels]),
        grids=grids,
        visual_index_M=torch.zeros(0, dtype=torch.long),
        image_keys=chosen,
    )


@pytest.fixture
def cached(tmp_path):
    """A model whose tower uses a cache, the same without, and what the first computes."""
    config = small_config(tmp_path / "run", **settings(tmp_path / "cache"))
    model, plain = model_of(), model_of()
    computed, forward = [], model.vision.forward
    model.vision.forward = lambda batch: computed.append(batch.image_keys) or forward(batch)
    feature_cache.apply(model, config, ALONE)
    return model.vision, plain.vision, computed


def assert_same(cached, plain, chosen):
    given, wanted = cached(batch_of(chosen)), plain(batch_of(chosen))
    assert set(given) == {"1", "final", "pooled"}
    for name, scale in given.items():
        torch.testing.assert_close(scale, wanted[name], rtol=1e-12, atol=1e-12)
        assert scale.dtype == torch.float64 and not scale.requires_grad


def test_a_picture_is_computed_once_and_its_features_are_the_towers(cached):
    tower, plain, computed = cached
    assert_same(tower, plain, [0, 1])
    assert computed == [[0, 1]]
    first, again = (tower(batch_of([1, 0, 1])) for _ in range(2))
    assert computed == [[0, 1]]
    for name in first:
        assert torch.equal(first[name], again[name])
    assert_same(tower, plain, [3, 1, 2, 0])
    assert computed == [[0, 1], [3, 2]]
    assert_same(tower, plain, [2, 3])
    assert_same(tower, plain, [])
    assert computed == [[0, 1], [3, 2]]


def test_a_grid_is_part_of_what_a_picture_is(cached):
    tower, plain, _ = cached
    one = batch_of([0])
    other = replace(one, grids=[(1, 6, 4)])
    assert not torch.allclose(tower(one)["final"], tower(other)["final"])
    torch.testing.assert_close(tower(other)["final"], plain(other)["final"])


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_computed_again(cached, tmp_path, damage):
    tower, plain, computed = cached
    tower(batch_of([0, 1]))
    file = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    damaged = {"cut": content[:-9], "flip": content, "empty": b""}[damage]
    file.write_bytes(damaged)
    assert_same(tower, plain, [0, 1])
    assert len(computed) == 2 and len(computed[1]) == 1
    assert_same(tower, plain, [0, 1])
    assert len(computed) == 2


def test_features_are_those_of_one_tower(tmp_path):
    def stamp(model, **changes):
        config = small_config(tmp_path / "run", **settings(tmp_path / "cache", **changes))
        feature_cache.apply(model, config, ALONE)
        return model.vision.forward.stamp

    assert stamp(model_of()) == stamp(model_of())
    other = model_of()
    with torch.no_grad():
        other.vision.blocks["3"].mlp.down.bias[5] += 1e-9
    naflex = model_of()
    naflex.vision.config = replace(naflex.vision.config, naflex=False)
    levels = model_of()
    levels.projector.config = replace(levels.projector.config, projector=Projector(levels=["2:0"]))
    stamps = [stamp(x) for x in (model_of(), model_of(1), other, naflex, levels)]
    assert len({*stamps, stamp(model_of(), training__dtype="float32")}) == 6


def test_a_place_that_cannot_be_written_costs_the_cache_only(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    config = small_config(tmp_path / "run", **settings(tmp_path / "cache"))
    model = model_of()
    feature_cache.apply(model, config, ALONE)
    for _ in range(2):
        assert_same(model.vision, model_of().vision, [0, 1])
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "data.feature_cache" in warning and "what is not there is computed" in warning


# ---------------------------------------------------------------------------- in a run


def computed_by(monkeypatch):
    """How many pictures the towers of this process compute from now on, outside of validation."""
    counts, forward = [], feature_cache.FeatureCache.__init__

    def wrapped(self, *args):
        forward(self, *args)
        compute = self.compute
        self.compute = lambda batch: counts.append(len(batch.grids)) or compute(batch)

    monkeypatch.setattr(feature_cache.FeatureCache, "__init__", wrapped)
    return counts


def losses(output):
    return [loss for _, loss, _ in curve(output)]


def test_a_second_run_computes_no_picture_and_learns_the_same(tmp_path, monkeypatch):
    counts = computed_by(monkeypatch)
    without = settings("", projector__depth="1")
    assert run(tmp_path / "plain", **without) == 0
    assert not counts
    with_cache = settings(tmp_path / "cache", projector__depth="1")
    assert run(tmp_path / "first", **with_cache) == 0
    assert sum(counts) > 0
    counts.clear()
    deeper = settings(tmp_path / "cache", training__steps="1")
    assert run(tmp_path / "second", **with_cache) == 0
    assert run(tmp_path / "deeper", **deeper) == 0  # another depth of the projector
    assert not counts
    plain = losses(tmp_path / "plain")
    assert losses(tmp_path / "first") == pytest.approx(plain, rel=1e-12)
    assert losses(tmp_path / "second") == pytest.approx(plain, rel=1e-12)


def test_stages_use_it_while_the_tower_stands_still(tmp_path, monkeypatch):
    stages = [
        ("frozen", "steps", 2, {"training.freeze": '["vision"]'}),
        ("moves", "steps", 1, {}),
        ("still", "steps", 1, {"training.freeze": '["vision", "text"]'}),
    ]
    more = {"curriculum__stages": stages_toml(stages), "training__steps": "1000"}
    more["training__freeze"] = ""
    counts = computed_by(monkeypatch)
    assert run(tmp_path / "plain", **settings("", **more)) == 0
    assert run(tmp_path / "cached", **settings(tmp_path / "cache", **more)) == 0
    plain = losses(tmp_path / "plain")
    assert len(plain) == 4
    assert losses(tmp_path / "cached") == pytest.approx(plain, rel=1e-12)
    first = sum(counts)
    counts.clear()
    assert run(tmp_path / "again", **settings(tmp_path / "cache", **more)) == 0
    assert losses(tmp_path / "again") == pytest.approx(plain, rel=1e-12)
    assert sum(counts) == 0 < first  # the tower of the third stage is the same, too


def test_going_back_to_a_stage_takes_that_stages_tower(tmp_path):
    """The second stage's weights are no part of what is looked up after a rollback to the first."""
    stages = [
        ("frozen", "steps", 2, {"training.freeze": '["vision"]'}),
        ("moves", "steps", 4, {}),
    ]
    more = {"curriculum__stages": stages_toml(stages), "training__steps": "1000"}
    more |= {"training__freeze": "", "checkpoint__every": "1"}
    run_ = train.prepare(small_config(tmp_path / "run", **settings(tmp_path / "cache", **more)))
    tower = run_.model.vision.forward
    assert isinstance(tower, feature_cache.FeatureCache)
    before = tower.stamp
    feature_cache.apply(run_.model, run_.config, run_.mesh)
    assert run_.model.vision.forward is tower  # not around itself
    train.save(run_)
    run_.checkpointer.wait()
    run_.stage, first = run_.stages[1], run_.stage
    train.enter(run_, run_.stages[1])
    with torch.no_grad():
        run_.model.vision.norm.weight += 1.0
    run_.guard.check_rollback = run_.guard.rolled_back = lambda *_: None
    train.roll_back(run_)
    assert run_.stage is first
    assert run_.model.vision.forward.stamp == before
    run_.loader.close()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__freeze": "text"}, "the vision tower trains"),
        ({"model__name": "qwen3_vl", "model__flavor": "debug_moe"}, 'use model.name = "omni"'),
        (
            {
                "moe__vision__experts": "4",
                "moe__vision__top_k": "1",
                "moe__vision__expert_width": "8",
                "moe__vision__noise": "jitter",
            },
            "expected moe.vision.noise = none",
        ),
    ],
)
def test_a_cache_that_nothing_could_use_is_refused(tmp_path, changes, message):
    more = settings(tmp_path / "cache", **changes)
    if "model__name" in changes:
        more = {k: v for k, v in more.items() if not k.startswith("projector")}
    with pytest.raises(ConfigError, match=message) as error:
        make_stages(small_config(tmp_path / "run", **more), 1)
    assert str(error.value).startswith("data.feature_cache = ")
    assert not (tmp_path / "cache").exists()
