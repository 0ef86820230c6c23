"""Every router against a loop over tokens, written from its formula: pairs, weights, gradients."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.routing_cases import (
    EXPERTS,
    LENS,
    TOP_K,
    best,
    hidden,
    pairs,
    room,
    router,
    sequences,
    tokens,
)
from titan_vlm.models.moe import noise
from titan_vlm.models.moe.router import SUMS
from titan_vlm.models.moe.tokens import tokens_of

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def logits_of(made, x_TD, of):
    return x_TD[of.index_V] @ made.weight.T


def softmax(values):
    exps = [torch.exp(v - max(values)) for v in values]
    return [e / sum(exps) for e in exps]


def assert_routes(made, x_TD, of, expected: dict[tuple[int, int], torch.Tensor]):
    """`expected`: the weight of each (number of the token, expert)."""
    routing = made(x_TD, of)
    index = of.index_V.tolist()
    assert sorted(pairs(routing)) == sorted((index[v], e) for v, e in expected)
    assert routing.token_ids_P.tolist() == sorted(routing.token_ids_P.tolist())
    number = {t: v for v, t in enumerate(index)}
    wanted = [expected[number[t], e] for t, e in pairs(routing)]
    if not wanted:
        return
    wanted_P = torch.stack(wanted)
    torch.testing.assert_close(routing.weights_P, wanted_P, **CLOSE)
    inputs = [x_TD, *made.parameters()]
    waves_P = torch.sin(torch.arange(1.0, len(wanted) + 1).double())
    for ours, theirs in zip(
        torch.autograd.grad((routing.weights_P * waves_P).sum(), inputs, allow_unused=True),
        torch.autograd.grad((wanted_P * waves_P).sum(), inputs, allow_unused=True),
        strict=True,
    ):
        zeros = torch.zeros((), dtype=torch.float64)
        ours, theirs = (zeros if g is None else g for g in (ours, theirs))
        torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=1e-9, atol=1e-11)


def scored(logits, score):
    return [torch.sigmoid(x) for x in logits] if score == "sigmoid" else softmax(logits)


@pytest.mark.parametrize("kind", ["random", "hot", "ties"])
@pytest.mark.parametrize("case", LENS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid"])
def test_top_k(score, normalize, case, kind):
    made, of = router(score=score, normalize=normalize, route_scale=2.5), tokens(case)
    x_TD = hidden(case, kind)
    if kind == "ties":  # all tokens alike, no two experts
        assert len(of) < 2 or torch.equal(x_TD[0], x_TD[-1])
    expected = {}
    for v, logits in enumerate(logits_of(made, x_TD, of)):
        logits = list(logits)
        chosen = best([x.item() for x in logits], TOP_K)
        weights = scored(logits, score)
        if score == "softmax_topk":
            weights = dict(zip(chosen, softmax([logits[e] for e in chosen]), strict=True))
        total = sum(weights[e] for e in chosen) if normalize else 1.0
        for e in chosen:
            expected[v, e] = 2.5 * weights[e] / total
    assert_routes(made, x_TD, of, expected)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_bias_and_groups_choose_but_do_not_weigh(groups, biased):
    settings = {"bias_update": "sign"} if biased else {}
    chosen_groups = 2 if groups > 1 else 1
    made = router(score="sigmoid", n_groups=groups, topk_groups=chosen_groups, **settings)
    bias = torch.linspace(-3.0, -1.5, EXPERTS).double()  # scores below 0: a mask of 0 would win
    if biased:
        made.steering.bias_E.copy_(bias)
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding")
    expected, size, moved = {}, EXPERTS // groups, 0
    for v, logits in enumerate(logits_of(made, x_TD, of)):
        scores = [torch.sigmoid(x) for x in logits]
        by = [s.item() + (bias[e].item() if biased else 0.0) for e, s in enumerate(scores)]
        values = [sum(sorted(by[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        allowed = best(values, chosen_groups)
        inside = [b if e // size in allowed else -math.inf for e, b in enumerate(by)]
        chosen = best(inside, TOP_K)
        moved += chosen != best([s.item() for s in scores], TOP_K)
        total = sum(scores[e] for e in chosen)
        for e in chosen:
            expected[v, e] = scores[e] / total
    assert moved or (groups == 1 and not biased)
    assert_routes(made, x_TD, of, expected)


@pytest.mark.parametrize("kind", ["random", "hot", "ties"])
@pytest.mark.parametrize("fallback", [True, False])
@pytest.mark.parametrize("chunk", [0, 6])
@pytest.mark.parametrize("factor", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("case", LENS)
def test_expert_choice(case, factor, chunk, fallback, kind):
    made = router(
        router="expert_choice",
        capacity_factor=factor,
        ec_chunk=chunk,
        ec_fallback=fallback,
        normalize=False,
        allow_noncausal=True,
    )
    of, x_TD = tokens(case), hidden(case, kind)
    scores = [softmax(list(logits)) for logits in logits_of(made, x_TD, of)]
    expected = {}
    for members in sequences(of):
        size = chunk or len(members)
        for start in range(0, len(members), size):
            part = members[start : start + size]
            for e in range(EXPERTS):
                for i in best([scores[v][e].item() for v in part], room(factor, len(part))):
                    expected[part[i], e] = scores[part[i]][e]
    if fallback:
        for v in range(len(of)):
            if not any(v == other for other, _ in expected):
                e = best([s.item() for s in scores[v]], 1)[0]
                expected[v, e] = scores[v][e]
    assert_routes(made, x_TD, of, expected)


def test_expert_choice_within_a_picture_ignores_the_rest_of_the_batch():
    made = router(router="expert_choice", capacity_factor=1.0, allow_noncausal=True)
    x_TD = hidden("three documents and padding")[:14].detach()
    both = made(x_TD, tokens_of([5, 9], [1, 2]))
    alone = made(x_TD[:5], tokens_of([5], [1]))
    first = both.token_ids_P < 5
    assert pairs(alone) == [pair for pair in pairs(both) if pair[0] < 5]
    torch.testing.assert_close(alone.weights_P, both.weights_P[first])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_thresholds_let_through_what_passes_them(score):
    made = router(router="threshold", score=score, normalize=False)
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding")
    logits_VE = logits_of(made, x_TD, of)
    first = made(x_TD, of)  # before the first step: top-k
    assert len(first.token_ids_P) == TOP_K * len(of)
    made.steering.steps.fill_(1)
    made.steering.threshold_E.copy_(torch.linspace(0.05, 0.4, EXPERTS))
    expected = {}
    for v, logits in enumerate(logits_VE):
        for e, s in enumerate(scored(list(logits), score)):
            if s.item() > torch.linspace(0.05, 0.4, EXPERTS)[e].item():
                expected[v, e] = s
    numbers = [sum(v == other for other, _ in expected) for v in range(len(of))]
    assert len(set(numbers)) > 1
    assert_routes(made, x_TD, of, expected)


def test_jitter_multiplies_the_gates_input():
    made = router(noise="jitter", noise_eps=0.3)
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding")
    draws_VD = noise.uniform(of, "here", "jitter", x_TD.shape[1])
    noisy_VD = x_TD[of.index_V] * (1 + 0.3 * (2 * draws_VD - 1))
    assert (noisy_VD / x_TD[of.index_V] - 1).abs().max() < 0.3
    expected = {}
    for v, logits in enumerate(noisy_VD @ made.weight.T):
        chosen = best(logits.tolist(), TOP_K)
        weights = softmax([logits[e] for e in chosen])
        expected |= {(v, e): w for e, w in zip(chosen, weights, strict=True)}
    assert_routes(made, x_TD, of, expected)
    made.eval()
    plain = router()(x_TD, of)
    torch.testing.assert_close(made(x_TD, of).weights_P, plain.weights_P)


def test_rsample_chooses_by_noisy_logits_and_weighs_by_clean_ones():
    made = router(noise="rsample")
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding")
    draws_VE = noise.gumbel(of, "here", "rsample", EXPERTS)
    expected, moved = {}, 0
    for v, logits in enumerate(logits_of(made, x_TD, of)):
        chosen = best((logits + draws_VE[v]).tolist(), TOP_K)
        moved += set(chosen) != set(best(logits.tolist(), TOP_K))
        weights = softmax([logits[e] for e in chosen])
        expected |= {(v, e): w for e, w in zip(chosen, weights, strict=True)}
    assert moved > 3
    assert_routes(made, x_TD, of, expected)


def test_learned_noise_chooses_and_weighs_in_training_only():
    made = router(router="noisy_topk", score="softmax_topk")
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding")
    draws_VE = noise.normal(of, "here", "topk", EXPERTS)
    x_VD = x_TD[of.index_V]
    std_VE = torch.log1p(torch.exp(x_VD @ made.noise_weight.T))
    expected = {}
    for v, logits in enumerate(x_VD @ made.weight.T + std_VE * draws_VE):
        chosen = best(logits.tolist(), TOP_K)
        weights = softmax([logits[e] for e in chosen])
        expected |= {(v, e): w for e, w in zip(chosen, weights, strict=True)}
    assert_routes(made, x_TD, of, expected)
    torch.testing.assert_close(made.eval()(x_TD, of).weights_P, router()(x_TD, of).weights_P)


def test_balanced_and_random_ignore_the_scores():
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding", "hot")
    for kind, limit in (("balanced", 1.8), ("random", 3.0)):
        made = router(router=kind)
        routing = made(x_TD, of)
        assert len(set(pairs(routing))) == TOP_K * len(of)  # no expert twice
        assert routing.counts_E.max() <= limit * TOP_K * len(of) / EXPERTS
        logits_VE = logits_of(made, x_TD, of)
        number = {t: v for v, t in enumerate(of.index_V.tolist())}
        for i in range(0, len(routing.token_ids_P), TOP_K):
            v = number[routing.token_ids_P[i].item()]
            wanted = logits_VE[v, routing.expert_ids_P[i : i + TOP_K]].softmax(-1)
            torch.testing.assert_close(routing.weights_P[i : i + TOP_K], wanted)


@pytest.mark.parametrize("by", ["position", "score"])
@pytest.mark.parametrize("scope", ["sequence", "batch", "rank"])
@pytest.mark.parametrize("kind", ["random", "hot", "ties"])
@pytest.mark.parametrize("case", LENS)
def test_capacity(case, kind, scope, by):
    settings = {"capacity_factor": 0.8, "min_capacity": 1, "capacity_scope": scope, "drop": by}
    made, of, x_TD = router(**settings), tokens(case), hidden(case, kind)
    plain = router()
    plain.weight = made.weight
    free = plain(x_TD, of)
    number = {t: v for v, t in enumerate(of.index_V.tolist())}
    made_pairs = [(number[t], e, w) for (t, e), w in zip(pairs(free), free.weights_P, strict=True)]
    groups = sequences(of) if scope == "sequence" else [list(range(len(of)))]
    place, name = of.place_V.tolist(), of.keys_N[of.sequence_V].tolist()
    expected = {}
    for members in groups:
        for e in range(EXPERTS):
            wanting = [(v, w) for v, other, w in made_pairs if other == e and v in members]
            order = {
                "position": lambda p: (place[p[0]], name[p[0]]),
                "score": lambda p: (-p[1].item(), place[p[0]], name[p[0]]),
            }[by]
            kept = sorted(wanting, key=order)[: max(1, room(0.8, len(members)))]
            expected |= {(v, e): w for v, w in kept}
    if kind == "hot" and case == "three documents and padding":
        assert len(expected) < len(made_pairs)
    assert_routes(made, x_TD, of, expected)
    assert made.sums[SUMS.index("kept")] == len(expected)
    assert made.sums[SUMS.index("made")] == len(made_pairs)


def test_every_expert_has_the_least_capacity():
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding", "hot")
    made = router(capacity_factor=0.01, min_capacity=3)
    routing = made(x_TD, of)
    first = [t for t, e in pairs(routing) if e == 0]
    assert first == [t for members in sequences(of) for t in of.index_V[members[:3]].tolist()]


def test_a_logit_that_is_not_finite_raises_the_flag():
    made, of, x_TD = router(), tokens("one token"), hidden("one token").detach()
    made(x_TD, of)
    assert made.broken.item() == 0
    made(x_TD.fill_(float("inf")), of)
    assert made.broken.item() == 1


def test_the_gate_stays_exact_under_autocast_and_in_a_bfloat16_model():
    low = router().bfloat16()
    of = tokens("three documents and padding")
    x_TD = hidden("three documents and padding").detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = low(x_TD, of)
    assert routing.weights_P.dtype == torch.float32
    wanted = (x_TD[of.index_V].float() @ low.weight.float().T).topk(TOP_K, -1).values.softmax(-1)
    torch.testing.assert_close(routing.weights_P, wanted.flatten(), rtol=1e-6, atol=1e-7)


def test_counts_stay_exact_in_a_model_of_any_dtype():
    made = router(score="sigmoid", bias_update="sign").bfloat16()
    assert made.weight.dtype == torch.bfloat16
    assert {x.dtype for x in made.buffers()} == {torch.int64, torch.float64}


def test_numbers_stay_exact_when_a_model_is_rounded():
    made = router(score="sigmoid", bias_update="sign")
    bias_E = torch.linspace(0.9, 1.1, EXPERTS).double()
    made.steering.bias_E.copy_(bias_E)
    made.sums.fill_(1234567.0)
    made.bfloat16()
    assert torch.equal(made.steering.bias_E, bias_E)
    assert (made.sums == 1234567.0).all()


class Twins:
    """Two ranks with the same tokens, as in evaluation."""

    size = 2

    def sum(self, x):
        return 2 * x

    def gather(self, *columns_P):
        return [torch.cat((x_P, x_P)) for x_P in columns_P], slice(0, len(columns_P[0]))


@pytest.mark.parametrize("scope", ["sequence", "batch", "rank"])
def test_evaluation_drops_nothing_on_any_mesh(scope):
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding", "hot")
    made = router(capacity_factor=0.8, min_capacity=1, capacity_scope=scope)
    assert len(made(x_TD, of).weights_P) < TOP_K * len(of)
    made.eval().batch_peers = Twins()
    assert pairs(made(x_TD, of)) == pairs(router().eval()(x_TD, of))


@pytest.mark.parametrize(
    "settings",
    [
        {"capacity_factor": 0.6, "min_capacity": 1, "score": "sigmoid", "aux_loss": 0.5},
        {"router": "expert_choice", "capacity_factor": 1.0, "z_loss": 0.5},
    ],
)
def test_layers_of_one_name_run_again_as_they_ran(settings):
    """Each finds in a recomputation what itself found."""
    case = "three documents and padding"
    gates = [router(**settings), router(**settings)]
    with torch.no_grad():
        gates[1].weight.neg_()

    def gradients(run):
        of, x_TD = tokens(case), hidden(case)
        routed = [run(lambda x, gate=gate: gate(x, of).weights_P, x_TD) for gate in gates]
        return torch.autograd.grad(
            sum(weights_P.square().sum() for weights_P in routed),
            [x_TD, *(gate.weight for gate in gates)],
        )

    plain = gradients(lambda forward, x_TD: forward(x_TD))
    again = gradients(partial(checkpoint, use_reentrant=False))
    for ours, theirs in zip(again, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_drops_wait_for_the_device_once():
    class Waits(TorchDispatchMode):
        names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            masks = [x for x in args[1] if x is not None] if func is aten.index.Tensor else []
            if func is aten.nonzero.default or any(x.dtype == torch.bool for x in masks):
                self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    aten = torch.ops.aten
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding", "hot")
    with Waits():
        router(capacity_factor=0.8, min_capacity=1)(x_TD, of)
    assert Waits.names == ["aten::nonzero"]


def test_uniform_numbers_are_never_1(monkeypatch):
    of = tokens("one token")
    for bits, wanted in ((-1, 1 - 2.0**-53), (0, 2.0**-53)):
        monkeypatch.setattr(noise, "_mix", lambda x, bits=bits: torch.full_like(x, bits))
        assert noise.uniform(of, "here", "site", 1).item() == wanted
