"""Every routing on every kind of mesh against one process, float64, through the trainer."""

import pytest

from scripts.check_parity import (
    LIMITS,
    compare,
    judged,
    ranks_and_words,
    record,
    small_words,
)

PICTURES = {
    "moe.vision.experts": "4",
    "moe.vision.top_k": "1",
    "moe.vision.expert_width": "64",
    "moe.vision.layers": "2,3",
    "moe.vision.router": "expert_choice",
    "moe.vision.capacity_factor": "1.0",
    "moe.vision.normalize": "false",
    "moe.vision.z_loss": "0.01",
    "moe.projector.experts": "4",
    "moe.projector.top_k": "2",
    "moe.projector.expert_width": "64",
    "moe.projector.router": "noisy_topk",
    "moe.projector.score": "softmax_topk",
    "moe.projector.cv_load": "0.01",
    "moe.projector.cv_importance": "0.01",
}
TEXT = {
    "deepseek": {
        "score": "sigmoid",
        "bias_update": "sign",
        "n_groups": "4",
        "topk_groups": "2",
        "sequence_loss": "0.01",
        "route_scale": "1.5",
        "shared_width": "64",
        "shared_gate": "true",
        "expert_bias": "true",
    },
    "qwen": {"aux_loss": "0.01", "z_loss": "0.001", "importance_loss": "0.01"},
    "annealed": {"aux_loss": "0.01", "anneal.aux_loss": "{ 0 = 1.0, 2 = 0.0 }"},
    "softmax, not normalised": {"normalize": "false", "aux_loss": "0.01"},
    "jitter": {"noise": "jitter", "noise_eps": "0.2"},
    "rsample": {"noise": "rsample"},
    "learned noise": {
        "router": "noisy_topk",
        "score": "softmax_topk",
        "cv_load": "0.01",
        "cv_importance": "0.01",
    },
    "expert choice": {
        "router": "expert_choice",
        "capacity_factor": "1.0",
        "ec_chunk": "16",
        "allow_noncausal": "true",
        "normalize": "false",
    },
    "thresholds": {"router": "threshold", "score": "sigmoid", "ema_decay": "0.5"},
    "quantile": {"score": "sigmoid", "bias_update": "quantile"},
    "random": {"router": "random"},
    "balanced": {"router": "balanced"},
    "drops by position": {"capacity_factor": "0.7"},
    "drops by score in the batch": {
        "capacity_factor": "0.7",
        "capacity_scope": "batch",
        "drop": "score",
        "allow_noncausal": "true",
    },
}
ROUTINGS = {name: {f"moe.text.{k}": v for k, v in of.items()} for name, of in TEXT.items()}
ROUTINGS["dropout"] = {
    "moe.text.dropout": "0.2",
    "moe.text.shared_width": "64",
    "training.attention_dropout": "0.2",
}
ROUTINGS["three branches, three routers"] = PICTURES | ROUTINGS["deepseek"]
# Two micro-batches of four rows, of all ranks together.
MESHES = (
    "ep=2,tp=2,training.micro_batch_size=2",
    "dp_shard=2,training.micro_batch_size=2",
    "ep=2,tp=2,expert_parallel_over_tp=true,training.micro_batch_size=2",
    "ep=2,tp=2,sequence_parallel=false,moe.text.dispatcher=allgather,training.micro_batch_size=2",
    "ep=2,activation_checkpoint.mode=full,training.micro_batch_size=2",
    "pp=2",
    "pp=2,tp=2,pp_schedule=ZBVZeroBubble",
    "pp=2,pp_split=text.layers.2",  # experts on both stages; else the first has none in its text
    "pp=2,dp_shard=2,ep=2,tp=2,training.micro_batch_size=1",
)
# Every axis alone or with another, both expert modes, and all four.
ESSENTIAL = (MESHES[0], MESHES[2], "pp=2,dp_shard=2,training.micro_batch_size=2", MESHES[-1])
OFTEN = {"deepseek", "qwen", "dropout", "three branches, three routers"}
FAST = "three branches, three routers"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    settings = {"training.micro_batch_size": "4", "training.steps": "3", "run.device": "cpu"}
    settings |= {"training.dtype": "float64"}
    changes = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return [*small_words(tmp_path_factory.mktemp("data")), *changes]


@pytest.fixture(scope="module")
def singles():
    return {}


@pytest.mark.parametrize(
    ("routing", "mesh"),
    [
        pytest.param(
            routing,
            mesh,
            marks=[] if routing == FAST and mesh == MESHES[0] else pytest.mark.slow,
        )
        for routing in ROUTINGS
        for mesh in (MESHES if routing in OFTEN else ESSENTIAL)
    ],
)
def test_a_routing_is_the_same_on_a_mesh(world, words, singles, tmp_path, routing, mesh):
    words = [*words, *(word for k, v in ROUTINGS[routing].items() for word in (f"--{k}", v))]
    if routing not in singles:
        singles[routing] = record([*words, "--run.output_dir", str(tmp_path / "single")])
    ranks, changes = ranks_and_words(mesh)
    output = ["--run.output_dir", str(tmp_path / "mesh")]
    trace = world.run(ranks, record, [*words, *changes, *output])[0]
    errors = compare(trace, singles[routing])
    for kind in judged("float64"):
        error, where = errors[kind]
        assert error <= LIMITS["float64"], f"{kind}: {error:.1e} at {where}"
