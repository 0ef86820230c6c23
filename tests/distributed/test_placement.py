"""Experts that change ranks: nothing that is computed changes, and the ranks' loads even out."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from scripts import convert
from scripts.check_parity import error
from tests.small_run import Silent, small_config, weights
from titan_vlm import distributed, train
from titan_vlm.config import Checkpoint
from titan_vlm.mesh import build_mesh
from titan_vlm.models.init import init_weights
from titan_vlm.models.layers.head import whole
from titan_vlm.models.moe.layer import MoE, moe_layers
from titan_vlm.models.moe.placement import LogicalOrder, balanced, replicate_experts
from titan_vlm.models.moe.tokens import tokens_of
from titan_vlm.models.qwen3_vl.config import FLAVORS, to_hf
from titan_vlm.parallel import expert
from titan_vlm.parallel.placement import arrange, rebalance, register
from titan_vlm.training.checkpoint import Checkpointer

AXES = ("pp", "dp_replicate", "dp_shard", "ep", "tp")
MOE_LAYERS = 3  # of debug_moe
# Experts 0 and 1 get most pairs.
SKEWED = [6, 6, 2, 2, 1, 1, 1, 1]


def settings(mesh: str) -> tuple[int, dict[str, str]]:
    """Ranks and changes of the small run: "ep=2,tp=2"."""
    degrees, changes = {}, {"parallelism__dp_shard": "1", "training__dtype": "float64"}
    for key, _, value in (item.partition("=") for item in mesh.split(",")):
        # `activation_checkpoint.mode` is a key of another section.
        changes[key if "." in key else f"parallelism__{key}"] = value
        if key in AXES:
            degrees[key] = int(value)
    readers = prod(degrees.get(axis, 1) for axis in ("dp_replicate", "dp_shard", "ep"))
    changes["training__global_batch_size"] = str(max(4, readers))
    changes["data__virtual_shards"] = "8"
    return prod(degrees.values()), changes


def layers_state(run: train.Run) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of the MoE layers of this stage, whole, by logical expert."""
    state = {name: p.detach() for name, p in run.model.named_parameters()}
    state |= {f"{name}.{key}": x for name, key, x in moments(run) if x.ndim}
    found = in_order(run, {name: x for name, x in state.items() if ".moe." in name})
    return found | {f"{name}.{key}": x.clone() for name, key, x in moments(run) if not x.ndim}


def in_order(run: train.Run, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole, by logical expert; on one rank of each stage, the others take part."""
    slots = {name: b for name, b in run.model.named_buffers() if name.endswith("slots_E")}
    ordered = LogicalOrder(state | slots)
    found = {name: whole(ordered[name]).clone() for name in ordered}
    return found if run.mesh.tokens.get_local_rank() == 0 else {}


def moments(run):
    for name, parameter in run.model.named_parameters():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            yield name, key, value


def skewed_loads(run, load=tuple(SKEWED)) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(load[:experts]) for name, (experts, *_) in run.moe_layers.items()}


def assert_same(ours, theirs, limit=1e-9):
    """To the last bit where the limit is 0."""
    assert ours.keys() == theirs.keys()
    errors = [(error(ours[name], theirs[name]), name) for name in theirs]
    assert [found for found in errors if found[0] > limit] == []


# ---------------------------------------------------------------------------- a whole run

# Experts that one layer's swaps move from rank to rank, and max/mean load before and after.
# On two ranks: 6 6 2 2 | 1 1 1 1 -> 1 6 2 2 | 6 1 1 1 -> 1 6 1 2 | 6 2 1 1.
TWO = (4, 1.6, 1.0)
# On four: 6 6 | 2 2 | 1 1 | 1 1 -> 1 6 | 2 2 | 6 1 | 1 1.
FOUR = (2, 2.4, 1.4)
MESHES = {
    "ep=2": TWO,
    "ep=2,moe.text.dispatcher=allgather": TWO,
    "dp_shard=2,ep=2": TWO,
    "ep=2,tp=2": TWO,
    "ep=2,tp=2,expert_parallel_over_tp=true": FOUR,
    "dp_replicate=2,ep=2": TWO,
    "pp=2,ep=2": TWO,
    "dp_shard=2,ep=2,cpu_offload=true": TWO,
    "ep=4,activation_checkpoint.mode=full": FOUR,
    "dp_replicate=2,dp_shard=2,ep=2": TWO,
    "dp_shard=2,ep=2,tp=2,expert_parallel_over_tp=true": FOUR,
}


@pytest.mark.parametrize(
    "mesh", [m if m == "ep=2" else pytest.param(m, marks=pytest.mark.slow) for m in MESHES]
)
def test_training_goes_on_as_if_no_expert_had_moved(world, tmp_path, mesh):
    ranks, changes = settings(mesh)
    experts, before, after = MESHES[mesh]
    left = world.run(ranks, two_steps, tmp_path / "left", changes, False)
    moved = world.run(ranks, two_steps, tmp_path / "moved", changes, True)
    for ours, theirs in zip(moved, left, strict=True):
        assert_same(ours["moved"], theirs["before"], limit=0)  # not one bit of one expert
        assert error(ours["loss"], theirs["loss"]) <= 1e-9
        assert_same(ours["gradients"], theirs["gradients"])
        assert_same(ours["after"], theirs["after"])
    # By hand: gate_up [128, 320] and down [160, 128], each a weight and two moments of 8 bytes.
    expert_bytes = (128 * 320 + 160 * 128) * 3 * 8
    replicas = 2 if "dp_replicate=2" in mesh else 1
    stages = 2 if "pp=2" in mesh else 1
    assert sum(result["layers"] for result in moved) == MOE_LAYERS * ranks // stages
    for result in moved:
        report = result["report"]
        assert report.experts == experts * result["layers"]
        assert report.bytes == report.experts * expert_bytes * replicas
        expected = (before, after) if result["layers"] else (1.0, 1.0)
        assert (report.before, report.after) == pytest.approx(expected)
    assert any(result["lies elsewhere"] for result in moved)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp_shard=2,ep=2", "pp=2,ep=2"])
def test_so_does_training_with_experts_in_every_branch(world, tmp_path, mesh):
    """With biases of experts and of the router, a shared expert, and pairs without room."""
    ranks, changes = settings(mesh)
    changes |= {"checkpoint.export_hf": "false", "moe.text.capacity_factor": "1.0"}
    changes |= {f"moe.{branch}.expert_bias": "true" for branch in ("text", "vision", "projector")}
    for branch in ("vision", "projector"):
        changes |= {f"moe.{branch}.experts": "4", f"moe.{branch}.top_k": "2"}
        changes |= {f"moe.{branch}.expert_width": "32"}
    changes |= {"moe.text.shared_width": "32", "moe.text.bias_update": "sign"}
    left = world.run(ranks, two_steps, tmp_path / "left", changes, False)
    moved = world.run(ranks, two_steps, tmp_path / "moved", changes, True)
    for ours, theirs in zip(moved, left, strict=True):
        assert_same(ours["moved"], theirs["before"], limit=0)
        assert error(ours["loss"], theirs["loss"]) <= 1e-9
        assert_same(ours["gradients"], theirs["gradients"])
        assert_same(ours["after"], theirs["after"])
    reports = {result["layers"]: result["report"] for result in moved}
    # Two of four experts, four of eight: of each layer half.
    assert sum(report.experts for report in reports.values()) > 4 * MOE_LAYERS
    assert any("_bias" in name for result in moved for name in result["moved"])
    assert any(name.startswith("vision") for result in moved for name in result["moved"])


def two_steps(output, changes, move):
    """A step, perhaps a change of placement, another step."""
    run = train.prepare(small_config(output, **changes))
    register(run.model)
    train.train_step(run, Silent())
    result = {"before": layers_state(run), "layers": len(moe_layers(run.model))}
    if move:
        parts = local_parts(run)
        result["report"] = rebalance(run.model, run.optimizer, run.mesh, skewed_loads(run))
        result["moved"] = layers_state(run)
        pairs = zip(parts, local_parts(run), strict=True)
        result["lies elsewhere"] = any(not torch.equal(a, b) for a, b in pairs)
    gradients = {}

    def keep(*_):
        found = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
        gradients.update(in_order(run, found))

    run.optimizer.register_step_pre_hook(keep)
    silent = Loss()
    train.train_step(run, silent)
    return result | {"loss": silent.loss, "gradients": gradients, "after": layers_state(run)}


def local_parts(run):
    """This rank's rows of every tensor of experts, as they lie."""
    named = run.model.named_parameters()
    return [p.to_local().clone() for name, p in named if ".experts." in name]


class Loss(Silent):
    def end_step(self, step, loss, **_):
        self.loss = torch.tensor(loss, dtype=torch.float64)


def test_experts_that_fsdp_shards_over_another_dimension(world, tmp_path):
    """Three experts on each of two ranks: dp_shard = 2 has to divide their rows."""
    debug = FLAVORS["debug_moe"]
    dims = replace(debug, text=replace(debug.text, num_experts=6))
    (tmp_path / "config.json").write_text(json.dumps(to_hf(dims)))
    ranks, changes = settings("dp_shard=2,ep=2")
    changes |= {"model__flavor": "hf", "model__hf_path": str(tmp_path)}
    for result in world.run(ranks, move_six, tmp_path / "run", changes):
        assert result["shape"] == (3, 64, 320)
        assert result["report"].bytes == MOE_LAYERS * 2 * (128 * 320 + 160 * 128) * 3 * 8
        assert_same(result["after"], result["before"], limit=0)


def move_six(output, changes):
    run = train.prepare(small_config(output, **changes))
    register(run.model)
    train.train_step(run, Silent())
    result = {"before": layers_state(run)}
    loads = skewed_loads(run, (5, 5, 0, 0, 1, 1))  # 5 5 0 | 0 1 1 -> 1 5 0 | 0 5 1
    result["report"] = rebalance(run.model, run.optimizer, run.mesh, loads)
    experts = next(m.experts for m in run.model.modules() if isinstance(m, MoE))
    shape = tuple(experts.gate_up.to_local().shape)
    return result | {"after": layers_state(run), "shape": shape}


def test_one_rank_has_nothing_to_move(world, tmp_path):
    _, changes = settings("ep=1")
    report, before, after = world.run(1, rebalance_alone, tmp_path, changes)[0]
    assert report.bytes == report.experts == 0
    assert_same(after, before, limit=0)


def rebalance_alone(output, changes):
    run = train.prepare(small_config(output, **changes))
    register(run.model)
    before = layers_state(run)
    report = rebalance(run.model, run.optimizer, run.mesh, skewed_loads(run))
    arrange(run.model, run.optimizer, run.mesh, "round_robin")
    return report, before, layers_state(run)


def test_experts_are_dealt_in_turn_and_back(world, tmp_path):
    ranks, changes = settings("ep=2")
    # Of four experts of each rank two go to the other: 0 2 4 6 | 1 3 5 7. Weights alone: there was
    # no step yet.
    sent = MOE_LAYERS * 4 * (128 * 320 + 160 * 128) * 8
    first, second = world.run(ranks, there_and_back, tmp_path, changes)
    assert first == {"sent": [sent, sent], "experts": [0, 2, 4, 6], "back": True}
    assert second == {"sent": [sent, sent], "experts": [1, 3, 5, 7], "back": True}


def there_and_back(output, changes):
    run = train.prepare(small_config(output, **changes))
    register(run.model)

    def slots():
        """In the order they lie."""
        return {n: whole(p.detach()) for n, p in run.model.named_parameters() if "experts" in n}

    before, name = slots(), "text.layers.1.moe.experts.down"
    sent = [arrange(run.model, run.optimizer, run.mesh, "round_robin")]
    rows = dict(run.model.named_parameters())[name].to_local()
    experts = [next(e for e, m in enumerate(before[name]) if torch.equal(m, row)) for row in rows]
    sent.append(arrange(run.model, run.optimizer, run.mesh, "linear"))
    back = all(torch.equal(after, before[n]) for n, after in slots().items())
    return {"sent": sent, "experts": experts, "back": back}


# ---------------------------------------------------------------------------- saved, exported


@pytest.mark.parametrize("mesh", ["ep=2", pytest.param("pp=2,ep=2", marks=pytest.mark.slow)])
def test_an_export_is_in_logical_order(world, tmp_path, mesh):
    ranks, changes = settings(mesh)
    world.run(ranks, export_before_and_after, tmp_path, changes)
    before, after = weights(tmp_path / "before"), weights(tmp_path / "after")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def export_before_and_after(output, changes):
    run = train.prepare(small_config(output / "run", **changes))
    register(run.model)
    train.export_hf(replace(run, output=output / "before"))
    rebalance(run.model, run.optimizer, run.mesh, skewed_loads(run))
    train.export_hf(replace(run, output=output / "after"))


@pytest.mark.parametrize(
    "mesh", ["ep=4", *(pytest.param(m, marks=pytest.mark.slow) for m in ("ep=1", "pp=2,ep=2"))]
)
def test_a_checkpoint_goes_to_any_mesh_and_to_hugging_face(world, tmp_path, mesh):
    ranks, changes = settings("ep=2")
    (saved, *_) = world.run(ranks, save_placed, tmp_path / "run", changes)
    ranks, changes = settings(mesh)
    results = world.run(ranks, load_placed, tmp_path / "other", changes, tmp_path / "run")
    found = {name: tensor for result in results for name, tensor in result["state"].items()}
    assert_same(found, saved["state"], limit=0)
    assert sum(r["loss"] for r in results if r["counts"]).item() == pytest.approx(
        saved["loss"].item(), rel=1e-9
    )
    folder = tmp_path / "run" / "checkpoints" / "step-000001"
    target = tmp_path / "hf"
    words = [str(folder), str(target), "--dtype", "float32"]
    assert convert.main([*words, "--layout", "published"]) == 0
    exported = weights(tmp_path)
    name = "model.language_model.layers.2.mlp.experts.down_proj"
    expected = saved["state"]["text.layers.2.moe.experts.down"].float()
    assert torch.equal(exported[name], expected)


def save_placed(output, changes):
    run = train.prepare(small_config(output, **changes))
    register(run.model)
    train.train_step(run, Silent())
    rebalance(run.model, run.optimizer, run.mesh, skewed_loads(run))
    run.checkpointer.save(1, run.model, run.optimizer, {"loader": run.loader.state_dict()})
    run.checkpointer.wait()
    state = layers_state(run)
    silent = Loss()
    train.train_step(run, silent)
    return {"state": state, "loss": silent.loss}


def load_placed(output, changes, other):
    run = train.prepare(small_config(output, **changes))
    checkpointer = Checkpointer(other / "checkpoints", Checkpoint())
    placed = [name for name in checkpointer.saved(1) if name.endswith("slots_E")]
    assert len(placed) == MOE_LAYERS
    register(run.model)
    ranks = checkpointer.load(1, run.model, run.optimizer)
    run.loader.load_state_dict(train.merge_states([rank["loader"] for rank in ranks]))
    run.step = 1
    state = layers_state(run)
    silent = Loss()
    train.train_step(run, silent)
    # What a step reports is the sum over all ranks; take it once.
    return {"state": state, "loss": silent.loss, "counts": dist.get_rank() == 0}


# ---------------------------------------------------------------------------- one layer

WIDTH, HIDDEN, EXPERTS, TOP_K, TOKENS = 12, 10, 8, 2, 64


def skewed_layer() -> MoE:
    """Its router prefers the first experts."""
    layer = MoE(WIDTH, HIDDEN, EXPERTS, TOP_K).double()
    init_weights(layer, 0, std=0.3)
    layer.router.weight.data[:, 0] = torch.linspace(0.9, 0.0, EXPERTS)
    return layer


def hidden_of(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    x_TD[:, 0] = 1.0
    return x_TD


def spread_layer(layer: MoE, dispatcher="all_to_all"):
    distributed.start("cpu")
    ranks = dist.get_world_size()
    degrees = dict.fromkeys(AXES, 1) | {"ep": ranks}
    mesh = build_mesh("cpu", degrees, False)
    model = nn.ModuleDict({"moe": layer})
    layer.router.config = replace(layer.router.config, dispatcher=dispatcher)
    return expert.apply(model, mesh), mesh


@pytest.mark.parametrize("dispatcher", ["all_to_all", "allgather"])
def test_a_layer_without_fsdp_computes_the_same_and_its_ranks_get_even_loads(world, dispatcher):
    results = world.run(2, layer_before_and_after, dispatcher)
    for result in results:
        assert_same(result["after"], result["before"])
    reports, counted = results[0]["report"], [result["pairs"] for result in results]
    for step, expected in ((0, reports.before), (1, reports.after)):
        pairs = [pairs[step] for pairs in counted]
        assert sum(pairs) == 2 * TOKENS * TOP_K
        assert max(pairs) / (sum(pairs) / 2) == pytest.approx(expected)
    assert reports.before > 1.3 and reports.after < 1.05
    # Two ranks that lead the same experts: a swap moves equally many both ways.
    assert reports.bytes == reports.experts * 3 * WIDTH * HIDDEN * 3 * 8


def layer_before_and_after(dispatcher):
    model, mesh = spread_layer(skewed_layer(), dispatcher)
    layer = model["moe"]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    register(model)
    pairs = []
    dispatch = layer.dispatcher.dispatch

    def counted(x_TD, routing):
        rows, state = dispatch(x_TD, routing)
        pairs.append(int((state.layout.weights_R > 0).sum()))
        return rows, state

    layer.dispatcher.dispatch = counted
    run_layer(layer)  # so that there is optimizer state
    optimizer.step()
    optimizer.zero_grad()
    pairs.clear()
    layer.router.load_E.zero_()
    before = run_layer(layer)
    optimizer.zero_grad()
    load_E = layer.router.load_E.clone()
    dist.all_reduce(load_E)
    report = rebalance(model, optimizer, mesh, {"moe": load_E})
    return {"before": before, "after": run_layer(layer), "report": report, "pairs": pairs}


def run_layer(layer):
    """Output and gradients, by logical expert."""
    x_TD = hidden_of(dist.get_rank()).requires_grad_()
    out_TD = layer(x_TD, tokens_of([TOKENS]))
    out_TD.sin().sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    if layer.slots_E is not None:
        found["slots_E"] = layer.slots_E
    in_order = LogicalOrder({**found, "x": x_TD.grad, "out": out_TD.detach()})
    return {name: whole(in_order[name]).clone() for name in in_order}


def test_a_layer_of_which_gradients_are_left_is_refused(world):
    assert world.run(2, rebalance_too_early) == [True] * 2


def rebalance_too_early():
    model, mesh = spread_layer(skewed_layer())
    register(model)
    run_layer(model["moe"])
    optimizer = torch.optim.AdamW(model.parameters())
    try:
        rebalance(model, optimizer, mesh, {"moe": torch.tensor(SKEWED)})
    except AssertionError as refusal:
        return "gradients" in str(refusal)


@pytest.mark.parametrize("slots", [8, 12])
def test_redundant_experts_on_two_ranks_do_not_change_the_output(world, slots):
    layer = skewed_layer()
    load_E = torch.zeros(EXPERTS, dtype=torch.int64)
    expected = []
    for rank in range(2):
        expected.append(layer(hidden_of(rank), tokens_of([TOKENS])).detach())
    load_E += layer.router.load_E
    results = world.run(2, layer_with_replicas, load_E, slots)
    for result, out in zip(results, expected, strict=True):
        torch.testing.assert_close(result["out"], out, rtol=1e-9, atol=1e-9)
        assert result["slots"] == slots // 2
    pairs = [result["pairs"] for result in results]
    assert sum(pairs) == 2 * TOKENS * TOP_K
    assert max(pairs) <= 1.05 * sum(pairs) / 2


@torch.no_grad()
def layer_with_replicas(load_E, slots):
    layer = skewed_layer()
    replicate_experts(layer, balanced(load_E, 2, slots))
    spread_layer(layer)
    rows = []
    dispatch = layer.dispatcher.dispatch

    def counted(x_TD, routing):
        found, state = dispatch(x_TD, routing)
        rows.append(int((state.layout.weights_R > 0).sum()))
        return found, state

    layer.dispatcher.dispatch = counted
    out = layer(hidden_of(dist.get_rank()), tokens_of([TOKENS]))
    assert isinstance(layer.experts.down, DTensor)
    return {"out": out, "pairs": rows[0], "slots": len(layer.experts.down.to_local())}


# ---------------------------------------------------------------------------- as a setting


def test_a_run_that_moves_experts_is_resumed_on_another_mesh(world, tmp_path):
    """Balanced every two steps on ep = 2, killed, then linear on one process: the same weights as
    of a run that never moved anything."""
    placed = {"parallelism__expert_placement": "balanced", "parallelism__eplb_interval": "2"}
    changes = {"training__dtype": "float64", "training__steps": "6", "checkpoint__every": "0"}
    changes |= {"checkpoint__export_dtype": "float64"}
    ep = {"parallelism__ep": "2"}
    moved = world.run(2, train_until, tmp_path / "moved", changes | ep | placed, 3)
    assert moved[0] and moved[0] == moved[1]  # some expert changed ranks
    world.run(1, train_until, tmp_path / "moved", changes | {"training__micro_batch_size": "2"}, 6)
    world.run(1, train_until, tmp_path / "still", changes | {"training__micro_batch_size": "2"}, 6)
    ours, theirs = (weights(tmp_path / name) for name in ("moved", "still"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def train_until(output, changes, step):
    """Train and save; at the last step also export. Returns whether experts lie elsewhere."""
    run = train.prepare(small_config(output, **changes))
    while run.step < step:
        train.train_step(run, Silent())
    train.save(run)
    if step == run.config.training.steps:
        train.export_hf(run)
    run.loader.close()
    tables = [layer.slots_E for layer in moe_layers(run.model).values()]
    return [t.tolist() for t in tables if t is not None and t.tolist() != list(range(len(t)))]


def test_round_robin_from_the_first_step_trains_the_same(world, tmp_path):
    changes = {"training__dtype": "float64", "training__steps": "3", "parallelism__ep": "2"}
    changes |= {"checkpoint__export_dtype": "float64", "checkpoint__every": "0"}
    robin = changes | {"parallelism__expert_placement": "round_robin"}
    assert (
        world.run(2, train_until, tmp_path / "robin", robin, 3)[0]
        == [[0, 4, 1, 5, 2, 6, 3, 7]] * MOE_LAYERS
    )
    world.run(2, train_until, tmp_path / "linear", changes, 3)
    ours, theirs = (weights(tmp_path / name) for name in ("robin", "linear"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
