"""A run in stages on meshes: each piece on another one, killed inside stages and on borders; and
what a frozen branch costs under FSDP2."""

import weakref

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from tests.curriculum_run import assert_is, by_hand, in_stages, stages_toml
from tests.small_run import Silent, curve, run, run_killed, small_config
from titan_vlm import train
from titan_vlm.data.ledger import read_ledger
from titan_vlm.models.moe.layer import moe_layers
from titan_vlm.stages import next_stage

MICRO = "training__micro_batch_size"
ONE = {MICRO: "2"}
DP = {"parallelism__dp_shard": "2", MICRO: "1"}
EP_TP = {"parallelism__ep": "2", "parallelism__tp": "2", MICRO: "1"}
PP = {"parallelism__pp": "2", MICRO: "2"}


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    return by_hand(tmp_path_factory.mktemp("hand"))


@pytest.mark.slow
def test_a_chain_of_meshes_through_three_stages_is_the_runs_by_hand(world, hand, tmp_path):
    _, _, (first, second, third), _ = hand
    border, last = first + second, first + second + third
    assert second > 1 and third > 1
    pieces = [(2, DP, first), (4, EP_TP, first + 1), (2, PP, border), (1, ONE, border + 1)]
    for ranks, axes, step in pieces:
        world.run(ranks, piece, tmp_path, step, in_stages(**axes))
    assert world.run(2, to_the_end, tmp_path, in_stages(**DP)) == [0, 0]
    assert len(curve(tmp_path)) == last
    assert_is(tmp_path, hand)


@pytest.mark.parametrize(
    ("ranks", "axes"),
    # Not saved but at its end, a run comes to a border as its validation leaves it.
    [
        pytest.param(2, PP, marks=pytest.mark.slow),
        (2, DP | {"checkpoint__every": "0"}),
        (4, PP | DP | {"checkpoint__every": "0"}),
        pytest.param(4, EP_TP, marks=pytest.mark.slow),
    ],
    ids=["pp2", "dp2", "pp2 x dp2", "ep2 x tp2"],
)
def test_borders_on_one_mesh_are_the_runs_by_hand(world, hand, tmp_path, ranks, axes):
    assert world.run(ranks, to_the_end, tmp_path, in_stages(**axes)) == [0] * ranks
    assert_is(tmp_path, hand)


def piece(output, step, changes):
    run_killed(output, step=step, **changes)


def to_the_end(output, changes):
    return run(output, **changes)


# ---------------------------------------------------------------------------- frozen branches


def test_a_frozen_branch_costs_no_gradient_no_state_and_no_traffic(world, tmp_path):
    for reduced, graded, with_state, branches, moved in world.run(2, what_it_costs, tmp_path):
        trained = set(branches["projector"])
        assert reduced[0] == graded[0] == with_state[0] == trained
        everything = trained | set(branches["vision"]) | set(branches["text"])
        assert reduced[1] == graded[1] == with_state[1] == everything - set(branches["vision"])
        assert not moved


def what_it_costs(output):
    """By stage the parameters whose gradients are reduced, that have a gradient, and a state."""
    stages = [
        ("a", "steps", 1, {"training.freeze": '["vision", "text"]'}),
        ("b", "steps", 1, {"training.freeze": '["vision"]'}),
    ]
    changes = in_stages(curriculum__stages=stages_toml(stages), **DP)
    run_ = train.prepare(small_config(output, **changes))
    reduced, graded, with_state, moved = [], [], [], []
    reduce = _fsdp_param_group.foreach_reduce

    def counted(params, *args, **kwargs):
        here = {id(p): name for name, p in run_.model.named_parameters()}
        reduced[-1] |= {here[id(p.sharded_param)] for p in params}
        return reduce(params, *args, **kwargs)

    _fsdp_param_group.foreach_reduce = counted
    try:
        for number in range(2):
            if number:
                before = {name: local(p).data_ptr() for name, p in run_.model.named_parameters()}
                old = weakref.ref(run_.model)
                next_stage(run_)
                assert old() is None  # nor is anything that it had gathered held
                after = {name: local(p).data_ptr() for name, p in run_.model.named_parameters()}
                moved = [name for name in before if before[name] != after[name]]
            reduced.append(set())

            def look(*_):
                named = run_.model.named_parameters()
                graded.append({name for name, p in named if p.grad is not None})

            run_.optimizer.register_step_pre_hook(look)
            train.train_step(run_, Silent())
            with_state.append(
                {name for name, p in run_.model.named_parameters() if p in run_.optimizer.state}
            )
    finally:
        _fsdp_param_group.foreach_reduce = reduce
    return reduced, graded, with_state, run_.model.branches(), moved


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------- waking experts


@pytest.mark.parametrize(
    "axes",
    [
        {"parallelism__ep": "2", "parallelism__dp_shard": "2", MICRO: "1"},
        {"parallelism__ep": "4", "parallelism__expert_placement": "round_robin", MICRO: "1"},
    ],
    ids=["ep2 x dp2", "placed round robin"],
)
def test_experts_wake_as_copies_wherever_they_lie(world, tmp_path, axes):
    for equal, placed in world.run(4, woken, tmp_path, axes):
        assert equal == {"weights": True, "moments": True}
        assert placed == ("parallelism__expert_placement" in axes)


def woken(output, axes):
    stages = [
        ("dense", "steps", 2, {"moe.text.asleep": "[1]"}),
        ("awake", "steps", 1, {}),
    ]
    changes = in_stages(curriculum__stages=stages_toml(stages), **axes)
    run_ = train.prepare(small_config(output, **changes))
    for _ in range(2):
        train.train_step(run_, Silent())
    layer = moe_layers(run_.model)["text.layers.1"]
    slot = 0 if layer.slots_E is None else int(layer.slots_E[0])
    wanted = [full(x) for x in of_experts(run_)]
    assert not all(torch.equal(x, x[slot].expand_as(x)) for x in wanted)
    next_stage(run_)
    got = [full(x) for x in of_experts(run_)]
    same = [torch.equal(g, w[slot].expand_as(w)) for g, w in zip(got, wanted, strict=True)]
    half = len(same) // 2
    return {"weights": all(same[:half]), "moments": all(same[half:])}, layer.slots_E is not None


def of_experts(run_):
    parameters = list(moe_layers(run_.model)["text.layers.1"].experts.parameters())
    return parameters + [run_.optimizer.state[p]["exp_avg"] for p in parameters]


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


# ---------------------------------------------------------------------------- OmniMoE


OMNI = {
    "model__name": "omni",
    "model__flavor": "debug",
    "projector__levels": "1:0,2:1,pooled:2",
    "moe__text__experts": "4",
    "moe__text__top_k": "2",
    "moe__text__expert_width": "64",
    "moe__vision__experts": "4",
    "moe__vision__top_k": "1",
    "moe__vision__expert_width": "64",
    "moe__vision__layers": "2,3",
    "moe__projector__experts": "4",
    "moe__projector__top_k": "1",
    "moe__projector__expert_width": "64",
    "moe__text__aux_loss": "0",
}
OMNI_STAGES = [
    (
        "align",
        *("steps", 2),
        {
            "training.freeze": '["vision", "text"]',
            "projector.depth": "1",
            "moe.text.asleep": "[0, 1, 2, 3]",
            "moe.vision.asleep": "[2, 3]",
        },
    ),
    ("all", "steps", 2, {"projector.depth": "2", "data.min_pixels": "4096"}),
    (
        "tune",
        *("steps", 1),
        {
            "training.freeze": '["vision"]',
            "training.seq_len": "80",
            "projector.levels": '["0:3", "2:0", "pooled:1"]',
        },
    ),
]


@pytest.mark.slow
def test_omni_in_three_stages_is_one_run_wherever_it_runs(world, tmp_path):
    changes = in_stages(**OMNI, curriculum__stages=stages_toml(OMNI_STAGES))
    assert run(tmp_path / "one", **changes) == 0
    world.run(2, piece, tmp_path / "moved", 2, changes | DP)
    world.run(4, piece, tmp_path / "moved", 3, changes | DP | {"parallelism__ep": "2"})
    assert world.run(2, to_the_end, tmp_path / "moved", changes | DP) == [0, 0]
    for ours, theirs in zip(curve(tmp_path / "moved"), curve(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert read_ledger(tmp_path / "moved") == read_ledger(tmp_path / "one")


def test_levels_go_to_other_layers_in_stages_of_a_pipeline(world, tmp_path):
    """Stages of the curriculum hand on other numbers of levels between stages of the pipeline, and
    are cut alike."""
    moved = [
        ("shallow", "steps", 1, {"projector.levels": '["1:0"]'}),
        ("deep", "steps", 1, {"projector.levels": '["2:3"]', "training.seq_len": "80"}),
        ("shallow again", "steps", 1, {"projector.levels": '["3:1"]'}),
    ]
    changes = {k: v for k, v in OMNI.items() if not k.startswith(("moe", "projector"))}
    changes |= {"moe__text__experts": "0", "projector__levels": "1:0"}
    changes = in_stages(**changes, curriculum__stages=stages_toml(moved))
    assert run(tmp_path / "one", **changes) == 0
    assert world.run(2, to_the_end, tmp_path / "pp", changes | PP) == [0, 0]
    assert len(curve(tmp_path / "one")) == 3
    for ours, theirs in zip(curve(tmp_path / "pp"), curve(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
