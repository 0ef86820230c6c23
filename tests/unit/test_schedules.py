"""Pipeline schedules: what is refused before anything starts, and where a model is cut."""

from dataclasses import replace
from pathlib import Path

import pytest

from titan_vlm.assembly import assemble
from titan_vlm.config import Parallelism, load_config
from titan_vlm.errors import ConfigError
from titan_vlm.models.qwen3_vl.config import FLAVORS
from titan_vlm.models.qwen3_vl.plan import pipeline_units
from titan_vlm.parallel.schedules import KINDS, cut, resolve_schedule, split_stages
from titan_vlm.parallel.support import refuse_combinations, table
from titan_vlm.parallelize import make_plan


def resolve(microbatches=4, **settings):
    return resolve_schedule(Parallelism(**({"pp": 2} | settings)), microbatches)


def test_stages_go_round_or_in_a_v():
    assert resolve(pp_schedule="1F1B").stage_ranks == (0, 1)
    assert resolve(pp_schedule="Interleaved1F1B").stage_ranks == (0, 1, 0, 1)
    assert resolve(pp_schedule="Interleaved1F1B", pp_stages_per_rank=3).stage_ranks == (0, 1) * 3
    assert resolve(pp_schedule="ZBVZeroBubble").stage_ranks == (0, 1, 1, 0)
    assert resolve(pp_microbatches=2).microbatches == 2
    assert resolve(pp=1) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pp_schedule": "2F2B"}, "expected one of GPipe, 1F1B"),
        (
            {"pp_microbatches": 3},
            "does not divide the 4 micro-batches of a step; use one of 1, 2, 4",
        ),
        ({"pp_microbatches": 1}, "takes at least as many as stages, not 1 .* = 2 or 4"),
        ({"pp_schedule": "DualPipeV", "pp": 4}, "over 8 stages .*a larger training.global_batch"),
        ({"pp_schedule": "GPipe", "pp_stages_per_rank": 2}, "has 1 stages on each rank; use 1"),
        ({"pp_schedule": "Interleaved1F1B", "pp_stages_per_rank": 1}, "2 or more .*use 2"),
        ({"pp": 1, "pp_split": ["lm_head"]}, "pp_split .* with a pipeline only"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(settings, said):
    with pytest.raises(ConfigError, match=said):
        resolve(**settings)


@pytest.mark.parametrize("microbatches", range(1, 9))
@pytest.mark.parametrize("name", list(KINDS))
def test_the_rules_are_those_of_torch(name, microbatches, fake_pipeline):
    try:
        schedule = resolve(microbatches, pp_schedule=name)
    except ConfigError:
        schedule = None
    assert fake_pipeline(name, microbatches) is (schedule is not None)


@pytest.fixture
def fake_pipeline(tmp_path):
    """Whether PyTorch makes the schedule for two ranks."""
    import torch
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)

    def makes(name, microbatches):
        kind, per_rank = get_schedule_class(name), KINDS[name].stages_per_rank or 2
        numbers = [0, 3] if KINDS[name].in_a_v else range(0, 2 * per_rank, 2)
        module, device = torch.nn.Linear(1, 1), torch.device("cpu")
        stages = [PipelineStage(module, i, 2 * per_rank, device) for i in numbers]
        single = issubclass(kind, PipelineScheduleSingle)
        try:
            kind(stages[0] if single else stages, microbatches, loss_fn=lambda x, _: x)
        except ValueError:
            return False
        return True

    yield makes
    dist.destroy_process_group()


def write(tmp_path, *rows):
    file = tmp_path / "schedule.csv"
    file.write_text("\n".join(rows))
    return {"pp_schedule": str(file)}


def test_a_file_says_where_the_stages_are(tmp_path):
    rows = ["0F0,0F1,,3F0,3I0,3F1,3I1,3W0,3W1,0I0,0W0,0I1,0W1", "1F0,2F0,1F1,2F1,2B0,1B0,2B1,1B1"]
    schedule = resolve(2, **write(tmp_path, *rows))
    assert schedule.stage_ranks == (0, 1, 1, 0)
    assert schedule.splits_backward and schedule.microbatches == 2


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["0F0,0B0"], "1 rows of actions for pp = 2"),
        (["0F0,0B0,1F0,1B0", "1F0,1B0"], "stage 1 is on ranks 0, 1"),
        (["0F0,0B0", "2F0,2B0"], r"expected stages 0, 1, 2, ..., got \[0, 2\]"),
        (["0F0,0B0", "1F0,1I0"], "stage 1, micro-batch 0 of 1: expected F and B.* got F, I"),
        (["0F0,0B0,0F1,0B1", "1F0,1B0,1F1,1B1"], "pp_microbatches = 2"),
    ],
)
def test_a_file_that_does_not_work_is_refused(tmp_path, rows, said):
    with pytest.raises(ConfigError, match=said):
        resolve(1, **write(tmp_path, *rows))


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match="none.csv: No such file"):
        resolve(pp_schedule="none.csv")


@pytest.mark.parametrize(
    ("costs", "stages", "starts"),
    [([4, 1, 1, 1, 1, 2], 3, [1, 4]), ([1] * 6, 3, [2, 4]), ([9, 1, 1, 1], 4, [1, 2, 3])],
)
def test_stages_cost_the_same_as_far_as_can_be(costs, stages, starts):
    assert cut(costs, stages) == starts


def test_vision_and_head_count_in_the_split():
    """Of Qwen3-VL-30B-A3B's 48 layers the first and the last stage have fewer."""
    units = pipeline_units(FLAVORS["30b-a3b"], 4096)
    stages = split_stages(units, resolve(8, pp=4), [])
    layers = [sum(unit.modules[0].startswith("text.layers") for unit in s) for s in stages]
    assert sum(layers) == 48
    assert layers[0] < max(layers) and layers[-1] < max(layers)
    costs = [sum(unit.cost for unit in stage) for stage in stages]
    assert max(costs) < 1.2 * sum(costs) / 4


def test_a_split_by_name():
    units = pipeline_units(FLAVORS["30b-a3b"], 4096)
    first, second = split_stages(units, resolve(), ["text.layers.20"])
    assert first[-1].modules == ("text.layers.19",)
    assert second[0].modules == ("text.layers.20",)
    with pytest.raises(ConfigError, match="'text.layers.99' is no part"):
        split_stages(units, resolve(), ["text.layers.99"])
    with pytest.raises(ConfigError, match="first modules of the stages 1 to 1, in order"):
        split_stages(units, resolve(), ["text.layers.2", "text.layers.1"])


def plan(world=2, **settings):
    words = [w for key, value in settings.items() for w in (f"--{key.replace('__', '.')}", value)]
    config = load_config("qwen_vlm_moe.toml", words)
    return make_plan(config, assemble(config), world)


def test_more_stages_than_parts_are_refused():
    with pytest.raises(ConfigError, match="16 pipeline stages, but the model has"):
        plan(16, parallelism__pp="16", parallelism__pp_schedule="GPipe")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"compile__enable": "true"}, "compile.enable: .*would run twice; use one of GPipe"),
        (
            {"activation_checkpoint__mode": "full"},
            "activation_checkpoint.mode .*each of its weights",
        ),
    ],
)
def test_a_split_backward_refuses_by_name_what_it_cannot_do(settings, said):
    plan(parallelism__pp="2", parallelism__pp_schedule="Interleaved1F1B", **settings)
    with pytest.raises(ConfigError, match=said):
        plan(parallelism__pp="2", parallelism__pp_schedule="ZBVZeroBubble", **settings)


def test_the_documentation_has_the_table_of_the_code():
    documentation = Path(__file__).parents[2] / "docs" / "parallelism.md"
    assert table() in documentation.read_text()


@pytest.mark.parametrize("name", ["deepep", "uccl_ep", "hybridep"])
def test_a_library_that_one_rank_has_no_use_for_is_refused(name):
    """Without it the layer would say nothing and do without the library."""
    settings = {"moe__text__dispatcher": name, "training__micro_batch_size": "2"}
    with pytest.raises(ConfigError, match=r'uccl_ep does not go with .*ep = 1.*use "all_to_all"'):
        plan(1, **settings)
    over_tp = {"parallelism__tp": "2", "parallelism__expert_parallel_over_tp": "true"}
    with pytest.raises(ConfigError, match="does not go with experts on one rank"):
        plan(2, **settings, parallelism__tp="2")
    plan(2, **settings, **over_tp)
    plan(2, **settings, parallelism__ep="2")
    for everywhere in ("local", "all_to_all", "allgather"):
        plan(1, moe__text__dispatcher=everywhere)


def test_tied_embeddings_are_refused_in_a_pipeline_by_name():
    config = load_config("qwen_vlm_moe.toml", ["--training.micro_batch_size", "2"])
    dims = replace(FLAVORS["debug"], tie_embeddings=True)
    schedule = resolve()
    with pytest.raises(ConfigError, match="pp > 1 does not go with tied embeddings"):
        refuse_combinations(config, {}, schedule, dims)
    refuse_combinations(config, {}, None, dims)
