"""[[curriculum.stages]]: what a stage is, what is refused, and how far a run is in one."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.curriculum_run import in_stages, stages_toml
from tests.small_run import small_config
from titan_vlm.config import Schedule, config_to_toml, load_config
from titan_vlm.errors import ConfigError
from titan_vlm.stages import make_stages
from titan_vlm.training import curriculum
from titan_vlm.training.curriculum import MAY_CHANGE, Length, Place, stage_configs
from titan_vlm.training.schedule import lr_factor

TWO = """
[optimizer]
lr = 1e-3
[[data.sources]]
name = "captions"
source = "digits"
weight = 3.0
[[data.sources]]
name = "web"
source = "digits"
weight = 1.0

[[curriculum.stages]]
name = "align"
steps = 20
training.freeze = ["vision"]
optimizer.lr = 1e-2
data.sources.web.off = true

[[curriculum.stages]]
name = "all"
tokens = 100_000
data.sources.web.weight = 9
[curriculum.stages.moe.text]
top_k = 1
[curriculum.stages.optimizer]
branch_lr = { vision = 1e-5 }
"""


def load(folder, text, *words):
    path = folder / "x.toml"
    path.write_text(text)
    return load_config(str(path), words)


# ---------------------------------------------------------------------------- settings


def test_each_stage_is_the_file_with_some_keys_changed(tmp_path):
    config = load(tmp_path, TWO)
    (first, length, align), (second, tokens, all_) = stage_configs(config)
    assert (first, length) == ("align", Length("steps", 20))
    assert (second, tokens) == ("all", Length("tokens", 100_000))
    assert align.training.freeze == ["vision"] and align.training.steps == 20
    assert align.optimizer.lr == 1e-2 and all_.optimizer.lr == 1e-3
    assert [source.off for source in align.data.sources] == [False, True]
    assert [source.weight for source in all_.data.sources] == [3.0, 9.0]
    assert all_.moe.text.top_k == 1 and all_.optimizer.branch_lr == {"vision": 1e-5}
    assert not align.curriculum.stages  # anyone could run it alone
    untouched = replace(align, training=config.training, optimizer=config.optimizer)
    assert replace(untouched, data=config.data, curriculum=config.curriculum) == config


def test_stages_survive_being_written_and_take_words(tmp_path):
    words = ["--curriculum.stages[1].tokens", "5", "--curriculum.stages[1].training.freeze=text"]
    words += ["--curriculum.stages[1].moe.text.aux_loss", "0.25"]
    config = load(tmp_path, TWO, *words)
    _, (_, length, changed) = stage_configs(config)
    assert length == Length("tokens", 5) and changed.training.freeze == ["text"]
    assert (changed.moe.text.aux_loss, changed.moe.text.top_k) == (0.25, 1)
    assert load(tmp_path, config_to_toml(config)) == config
    for word, said in [
        ("--curriculum.stages[7].training.freeze=x", "expected the number of one of 2 table(s)"),
        ("--curriculum.stages[0].training.freeez=x", "curriculum.stages[0].training.freeez: unkn"),
        ("--curriculum.stages[0].optimizer.lr=x", "optimizer.lr: expected finite float >= 0, got"),
        ("--curriculum.stages[0].model.name=x", "model.name: no setting that a stage can change"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(said)):
            load(tmp_path, TWO, word)


def test_a_word_for_a_key_of_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"stages\[0\].optimizer.lr: expected a table around lr"):
        load(tmp_path, f"{ONE}steps = 1\noptimizer = 5", "--curriculum.stages[0].optimizer.lr", "1")


def test_without_stages_there_is_one_without_a_name():
    config = load_config("qwen_vlm_moe.toml")
    assert stage_configs(config) == [("", Length("steps", config.training.steps), config)]


def test_every_key_that_a_stage_may_change_exists():
    from titan_vlm.config import Config
    from titan_vlm.settings import leaves

    keys = {key for key, _ in leaves(Config)}
    for pattern in MAY_CHANGE:
        for branch in ("text", "vision", "projector"):
            key = pattern.replace("moe.*", f"moe.{branch}").replace("sources.*", "sources[n]")
            assert key in keys, key


def test_the_stages_of_the_documentation_are_stages(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "curriculum.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    sources = "".join(
        f'[[data.sources]]\nname = "{name}"\nsource = "digits"\nweight = 1\n'
        for name in ("captions", "instructions")
    )
    config = load(
        tmp_path, f"[moe.text]\naux_loss = 0.1\n[data]\nmin_pixels = 1024\n{sources}{example}"
    )
    assert [name for name, _, _ in stage_configs(config)] == ["align", "all", "tune"]


ONE, OTHER = (f'[[curriculum.stages]]\nname = "{name}"\n' for name in "ab")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ONE, '[0] ("a"): steps: expected one of steps, tokens, samples, got none'),
        (f"{ONE}step = 3", '[0] ("a"): step: no setting that a stage can change; the nearest is'),
        (ONE + "steps = 1\ntokens = 2", "got steps = 1 and tokens = 2"),
        ("[[curriculum.stages]]\nsteps = 1", '[0] (""): name: expected a name of its own'),
        (f"{ONE}steps = 1\n{ONE}steps = 1", '[1] ("a"): name: expected a name of its own'),
        (
            ONE + 'steps = 1\nmodel.flavor = "debug"',
            '[0] ("a"): model.flavor: no setting that a stage can change; the nearest is',
        ),
        (ONE + "steps = 1\nsetps = 2", "setps: no setting that a stage can change; the nearest is"),
        (
            ONE + "steps = 1\nmoe.text.topk = 2",
            "moe.text.topk: no setting that a stage can change; the nearest is moe.text.top_k",
        ),
        (
            ONE + "steps = 1\nmoe.text.experts = 2",
            "moe.text.experts: no setting that a stage can change",
        ),
        (ONE + 'steps = 1\nmoe.text.top_k = "x"', 'moe.text.top_k: expected int >= 0, got "x"'),
        (ONE + "steps = 1\nschedule.warmup_steps = 2", "expected at most training.steps (1)"),
        (ONE + "steps = 1\ndata.max_pixels = 4", '[0] ("a"): data.min_pixels: expected at most'),
        (
            TWO.replace("web.weight", "wed.weight"),
            '[1] ("all"): data.sources.wed: no table has this name; there are captions, web',
        ),
        (
            f"{ONE}steps = 1\n{OTHER}steps = 1\nmoe.text.asleep = [0]",
            '[1] ("b"): moe.text.asleep: expected none but []',
        ),
        (
            f'[projector]\nlevels = ["1:0", "pooled:1"]\n{ONE}steps = 1\n'
            f'{OTHER}steps = 1\nprojector.levels = ["pooled:0", "1:1"]',
            '[1] ("b"): projector.levels: expected 2 of them, with pooled in the places where the',
        ),
        (f"[training]\nsteps = 3\n{ONE}steps = 1", "training.steps: leave it out beside"),
        ("curriculum.stages = 3", "curriculum.stages: expected tables [[curriculum.stages]], got"),
    ],
)
def test_wrong_stages_are_refused_by_name_and_key(tmp_path, text, said):
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"training.freeze": '["visoin"]'}, "training.freeze: 'visoin' matches no branch"),
        ({"moe.text.top_k": "99"}, "moe.text.top_k: expected at most the"),
        ({"moe.text.asleep": "[99]"}, "moe.text.asleep: expected some of the layers with experts"),
        ({"optimizer.branch_lr": "{ vison = 1 }"}, "optimizer.branch_lr: 'vison' matches no"),
        (
            {"optimizer.branch_lr": "{ vision = 1 }", "training.freeze": '["vision"]'},
            "optimizer.branch_lr: 'vision' is the rate of no parameter that is trained",
        ),
        ({"projector.depth": "1"}, "projector.depth: leave it out; Qwen3-VL has a projector"),
    ],
)
def test_what_only_building_a_later_stage_shows_is_refused_at_start(tmp_path, own, said):
    stages = [("first", "steps", 1, {}), ("second", "steps", 1, own)]
    changes = in_stages(curriculum__stages=stages_toml(stages), moe__text__asleep="[]")
    if "asleep" in said:
        changes["curriculum__stages"] = stages_toml([("second", "steps", 1, own)])
    with pytest.raises(ConfigError) as refused:
        make_stages(small_config(tmp_path, **changes), 1)
    assert str(refused.value).startswith("curriculum.stages[")
    assert f'("second"): {said}' in str(refused.value)


def test_a_batch_that_the_ranks_cannot_share_is_refused_in_its_stage(tmp_path):
    stages = [("one", "steps", 1, {}), ("two", "steps", 1, {"training.global_batch_size": "6"})]
    config = small_config(tmp_path, **in_stages(curriculum__stages=stages_toml(stages)))
    with pytest.raises(ConfigError, match=r'^curriculum.stages\[1\] \("two"\): training.global_b'):
        make_stages(config, 2)


# ---------------------------------------------------------------------------- where a run is


def test_a_stage_in_tokens_has_as_many_steps_as_at_its_pace():
    place, length = Place("b", began=10), Length("tokens", 1000)
    assert place.schedule(10, length) == (0, float("inf"))
    place.count({"tokens": 100, "samples": 3})
    place.count({"tokens": 150, "samples": 3})
    assert place.schedule(12, length) == (2, 8.0) and not place.is_over(12, length)
    place.count({"tokens": 750, "samples": 1})
    assert place.is_over(13, length) and place.is_over(13, Length("samples", 7))
    assert Place("c", began=13).schedule(15, Length("steps", 4)) == (2, 4)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_a_schedule_without_a_known_end_stays_at_its_peak(kind):
    schedule = Schedule(kind=kind, decay_steps=3 if kind == "wsd" else 0)
    assert lr_factor(0, schedule, float("inf")) == 1.0


def test_a_stage_of_another_model_is_refused_at_start(tmp_path, monkeypatch):
    """Nothing that a stage may change does it; were there something, hours would be lost."""
    monkeypatch.setattr(curriculum, "MAY_CHANGE", (*MAY_CHANGE, "moe.*.shared_width"))
    own = {"moe.text.shared_width": "8"}
    stages = [("first", "steps", 1, {}), ("second", "steps", 1, own)]
    changes = in_stages(curriculum__stages=stages_toml(stages), moe__text__asleep="[]")
    with pytest.raises(ConfigError, match=r'"second"\): .*shared.* but none in the first stage'):
        make_stages(small_config(tmp_path, **changes), 1)
