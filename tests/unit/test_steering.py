"""Routers that balance themselves after every step, against their formulas; and the random numbers
that no mesh can change."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.routing_cases import EXPERTS, TOP_K, best, hidden, router, tokens
from titan_vlm.models.moe import noise
from titan_vlm.models.moe.config import MoEConfig
from titan_vlm.models.moe.router import Router
from titan_vlm.models.moe.steering import BINS, QuantileBias, Thresholds
from titan_vlm.models.moe.tokens import Moment, name_key, tokens_of

CASE = "three documents and padding"


def step(made, kind="random"):
    """A step of two micro-batches; returns the scores of all its tokens."""
    of, x_TD = tokens(CASE), hidden(CASE, kind).detach()
    made(x_TD, of)
    made(-x_TD, tokens(CASE))
    made.steering.update(made.steering.pending.clone())
    made.steering.pending.zero_()
    logits_VE = torch.cat([x_TD[of.index_V], -x_TD[of.index_V]]) @ made.weight.detach().T
    return made.scores(logits_VE)


@pytest.mark.parametrize("centred", [True, False])
def test_the_bias_moves_by_its_speed_against_the_load(centred):
    made = router(score="sigmoid", bias_update="sign", bias_speed=0.25, bias_centred=centred)
    before = [0.0] * EXPERTS
    for _ in range(3):
        scores_VE = made_scores(made)
        load = [0] * EXPERTS
        for row in scores_VE.tolist():
            for e in best([s + b for s, b in zip(row, before, strict=True)], TOP_K):
                load[e] += 1
        mean = sum(load) / EXPERTS
        wanted = [
            b + 0.25 * (1 if n < mean else -1 if n > mean else 0)
            for b, n in zip(before, load, strict=True)
        ]
        if centred:
            wanted = [b - sum(wanted) / EXPERTS for b in wanted]
        step(made)
        assert made.steering.bias_E.tolist() == pytest.approx(wanted, abs=1e-12)
        before = wanted
    assert max(before) - min(before) >= 0.5


def made_scores(made):
    of, x_TD = tokens(CASE), hidden(CASE).detach()
    x_VD = torch.cat([x_TD[of.index_V], -x_TD[of.index_V]])
    return made.scores(x_VD @ made.weight.detach().T)


def naive_quantile(values, share, low, width):
    """By a histogram, in loops."""
    counts = [0] * BINS
    for x in values:
        counts[min(max(math.floor((x - low) / width), 0), BINS - 1)] += 1
    target, below = share * len(values), 0
    for i, n in enumerate(counts):
        if below + n >= target:
            return low + width * (i + (target - below) / max(n, 1))
        below += n
    raise AssertionError("no bin")


def test_quantile_balancing_sets_the_bias_to_where_the_step_would_have_been_balanced():
    made = router(score="sigmoid", bias_update="quantile")
    for _ in range(2):
        bias = made.steering.bias_E.clone()
        scores_VE = made_scores(made)
        most = 1 + bias.max().item() - bias.min().item()
        asked = [[] for _ in range(EXPERTS)]
        for row in scores_VE.tolist():
            rival = sorted((s + b for s, b in zip(row, bias.tolist(), strict=True)), reverse=True)
            for e in range(EXPERTS):
                asked[e].append(math.cbrt((rival[TOP_K] - row[e] - bias[e].item()) / most))
        share = TOP_K / EXPERTS
        places = [naive_quantile(x, share, -1.0, 2 / BINS) for x in asked]
        wanted = [b + most * u**3 for b, u in zip(bias.tolist(), places, strict=True)]
        wanted = [b - sum(wanted) / EXPERTS for b in wanted]
        step(made)
        assert made.steering.bias_E.tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("experts", "groups", "chosen_groups"),
    [(12, 3, 2), (12, 4, 2), (12, 4, 3), (12, 6, 3), (12, 12, 5), (12, 4, 4), (12, 4, 1)],
)
def test_quantile_balancing_asks_for_what_takes_a_token_through_the_groups(
    experts, groups, chosen_groups
):
    top_k, size = 3, experts // groups
    generator = torch.Generator().manual_seed(groups)
    scores_VE = torch.randn(40, experts, dtype=torch.float64, generator=generator).sigmoid()
    scores_VE += torch.linspace(0, 0.3, experts).double()
    made = QuantileBias(experts, top_k, groups, chosen_groups)
    made.bias_E.copy_(0.1 * torch.randn(experts, generator=generator))
    bias = made.bias_E.tolist()
    most = 1 + max(bias) - min(bias)

    def value(row, g):
        return sum(sorted(row[g * size : (g + 1) * size])[-2:])

    def enters(row, e, shift):
        """Whether expert e's group is chosen, were its scores so much higher."""
        row = [s + shift if i // size == e // size else s for i, s in enumerate(row)]
        values = [value(row, g) for g in range(groups)]
        return e // size in best(values, chosen_groups)

    asked = [[] for _ in range(experts)]
    for scores in scores_VE.tolist():
        row = [s + b for s, b in zip(scores, bias, strict=True)]
        inside = best([value(row, g) for g in range(groups)], chosen_groups)
        selectable = sorted((s for e, s in enumerate(row) if e // size in inside), reverse=True)
        rival = selectable[min(top_k, len(selectable) - 1)]
        chosen = [e for e, s in enumerate(row) if e // size in inside and s > rival]
        for e in range(experts):
            low, high = -10.0, 10.0
            for _ in range(60):  # bisect
                middle = (low + high) / 2
                low, high = (low, middle) if enters(row, e, middle) else (middle, high)
            asked[e].append(max(rival - row[e], high))
            assert (e in chosen) == (asked[e][-1] < 0) or abs(asked[e][-1]) < 1e-12
    places = [[math.cbrt(x / most) for x in column] for column in asked]
    places = [naive_quantile(x, top_k / experts, -1.0, 2 / BINS) for x in places]
    wanted = [b + most * u**3 for b, u in zip(bias, places, strict=True)]
    wanted = [b - sum(wanted) / experts for b in wanted]
    made.look(scores_VE)
    made.update(made.pending)
    assert made.bias_E.tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("chosen_groups", [4, 2, 1])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_quantiles_balance_experts_in_groups_of_unequal_luck(score, chosen_groups):
    generator = torch.Generator().manual_seed(0)
    groups = {"n_groups": 8, "topk_groups": chosen_groups}
    made = Router(64, 64, 4, MoEConfig(score=score, bias_update="quantile", **groups))
    with torch.no_grad():
        made.weight.copy_(torch.eye(64))  # a token is its logits
    x_TD = torch.randn(2048, 64, generator=generator)
    x_TD += 0.3 * torch.randn(8, generator=generator).repeat_interleave(8)
    for _ in range(20):
        made.load_E.zero_()
        made(x_TD, tokens_of([2048]))
        made.steering.update(made.steering.pending.clone())
        made.steering.pending.zero_()
    assert made.load_E.max() / made.load_E.double().mean() < 1.1


def skewed(**settings):
    """A gate that likes two experts, and many tokens."""
    made = router(**settings)
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(2000, made.weight.shape[1], dtype=torch.float64, generator=generator)
    x_TD[:, 0] = 1.0
    with torch.no_grad():
        made.weight[:, 0] = torch.tensor([2.0, 2.0, 0, 0, 0, 0, -1.0, -1.0]).double()
    return made, x_TD


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"score": "sigmoid", "bias_update": "quantile"}, 8),
        ({"score": "softmax", "bias_update": "quantile"}, 8),
        ({"score": "sigmoid", "bias_update": "sign", "bias_speed": 0.01}, 100),
        ({"router": "threshold", "score": "sigmoid", "ema_decay": 0.5}, 10),
        ({"router": "threshold", "score": "softmax", "ema_decay": 0.5}, 10),
    ],
)
def test_a_skewed_load_becomes_even(settings, steps):
    made, x_TD = skewed(**settings)
    imbalance = []
    for _ in range(steps + 1):
        made.load_E.zero_()
        made(x_TD, tokens_of([2000]))
        imbalance.append((made.load_E.max() / made.load_E.double().mean()).item())
        made.steering.update(made.steering.pending.clone())
        made.steering.pending.zero_()
    assert imbalance[0] > 1.8
    assert imbalance[-1] < 1.1
    if settings.get("router") == "threshold":  # K experts of a token on average
        assert made.load_E.sum() == pytest.approx(TOP_K * 2000, rel=0.05)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_quantiles_balance_hundreds_of_experts_whose_scores_hardly_differ(score):
    generator = torch.Generator().manual_seed(0)
    made = Router(32, 256, 8, MoEConfig(score=score, bias_update="quantile"))
    torch.nn.init.normal_(made.weight, std=0.05, generator=generator)
    x_TD = torch.randn(4096, 32, generator=generator) + 0.3
    for _ in range(8):
        made.load_E.zero_()
        made(x_TD, tokens_of([4096]))
        made.steering.update(made.steering.pending.clone())
        made.steering.pending.zero_()
    assert made.load_E.max() / made.load_E.double().mean() < 1.1


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_thresholds_are_averages_of_what_the_share_of_tokens_passes(score):
    made = router(router="threshold", score=score, ema_decay=0.75)
    first = step(made)
    place = (lambda s: math.log(s / (1 - s))) if score == "sigmoid" else math.log
    back = (lambda x: 1 / (1 + math.exp(-x))) if score == "sigmoid" else math.exp

    def wanted(scores_VE, before):
        found = []
        for column, threshold in zip(scores_VE.T.tolist(), before, strict=True):
            middle = place(threshold)
            away = [math.cbrt((place(s) - middle) / 40) for s in column]
            away = naive_quantile(away, 1 - TOP_K / EXPERTS, -1.0, 2 / BINS)
            found.append(back(middle + 40 * away**3))
        return found

    even = [0.5 if score == "sigmoid" else 1 / EXPERTS] * EXPERTS
    one = wanted(first, even)
    assert made.steering.threshold_E.tolist() == pytest.approx(one, rel=1e-9, abs=0)
    two = wanted(step(made, "ties"), one)
    both = [0.75 * a + 0.25 * b for a, b in zip(one, two, strict=True)]
    assert made.steering.threshold_E.tolist() == pytest.approx(both, rel=1e-9, abs=0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_thresholds_of_a_gate_that_hardly_prefers_are_exact_quantiles(score):
    """256 experts whose scores differ by thousandths, around a level of each expert's own."""
    generator = torch.Generator().manual_seed(0)
    made = Thresholds(256, 8, 0.0, score == "sigmoid")
    levels_E = 0.003 * torch.randn(256, generator=generator, dtype=torch.float64)
    logits_VE = 0.001 * torch.randn(4096, 256, generator=generator, dtype=torch.float64) + levels_E
    scores_VE = logits_VE.sigmoid() if score == "sigmoid" else logits_VE.softmax(-1)
    for _ in range(2):  # the second one begins where the first one came to
        made.look(scores_VE)
        made.update(made.pending.clone())
        made.pending.zero_()
    exact_E = scores_VE.quantile(1 - 8 / 256, dim=0)
    spread_E = scores_VE.std(0)
    assert ((made.threshold_E - exact_E).abs() / spread_E).max() < 0.02
    passed_E = (scores_VE > made.threshold_E).sum(0) / 4096
    assert passed_E.sub(8 / 256).abs().max() < 0.05 * 8 / 256


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_thresholds_stay_finite_where_scores_are_0_or_1(score):
    for sigmoid in (True, False):
        made = Thresholds(4, 2, 0.0, sigmoid)
        for _ in range(30):
            made.look(torch.full((5, 4), score))
            made.update(made.pending.clone())
            made.pending.zero_()
            assert made.threshold_E.isfinite().all()
        assert (made.threshold_E - score).abs().max() < 1e-3


def test_expert_choice_keeps_averages_of_load_and_importance():
    made = router(router="expert_choice", capacity_factor=1.0, ema_decay=0.75, ec_fallback=False)
    of, x_TD = tokens(CASE), hidden(CASE).detach()
    shares = []
    for sign in (1, -1):
        routing = made(sign * x_TD, tokens(CASE))
        load, importance = [0] * EXPERTS, [0.0] * EXPERTS
        for e, w in zip(routing.expert_ids_P.tolist(), routing.weights_P.tolist(), strict=True):
            load[e] += 1
            importance[e] += w
        shares.append([[x / sum(values) for x in values] for values in (load, importance)])
        made.steering.update(made.steering.pending.clone())
        made.steering.pending.zero_()
    for buffer, a, b in zip(
        (made.steering.load_ema_E, made.steering.importance_ema_E), *shares, strict=True
    ):
        wanted = [0.75 * x + 0.25 * y for x, y in zip(a, b, strict=True)]
        assert buffer.tolist() == pytest.approx(wanted)
    assert len(of) == 17


@pytest.mark.parametrize(
    "settings",
    [
        {"score": "sigmoid", "bias_update": "sign"},
        {"score": "sigmoid", "bias_update": "quantile"},
        {"router": "threshold"},
        {"router": "expert_choice", "capacity_factor": 1.0},
    ],
)
def test_a_step_without_tokens_changes_nothing(settings):
    made = router(**settings)
    step(made)
    before = {name: x.clone() for name, x in made.state_dict().items()}
    made(torch.empty(0, made.weight.shape[1]).double(), tokens("nothing"))
    made.steering.update(made.steering.pending.clone())
    if settings.get("bias_update") == "sign":
        before["steering.bias_E"] -= before["steering.bias_E"].mean()  # centred already
    for name, x in made.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=1e-15)


def test_state_is_saved_and_counters_are_not():
    made = router(score="sigmoid", bias_update="sign")
    assert set(made.state_dict()) == {"weight", "steering.bias_E"}


# ---------------------------------------------------------------------------- random numbers


def test_noise_depends_on_the_sample_and_the_place_alone():
    both = tokens_of([5, 3], [11, 22], None, Moment(seed=1, step=7))
    swapped = tokens_of([3, 5], [22, 11], None, Moment(seed=1, step=7, micro_batch=3))
    first, second = (noise.uniform(of, "layer", "site", 4) for of in (both, swapped))
    assert torch.equal(first, second[[3, 4, 5, 6, 7, 0, 1, 2]])
    half = both.part(8, 2, 1)
    assert torch.equal(noise.uniform(half, "layer", "site", 4), first[4:])
    assert torch.equal(noise.uniform(both, "layer", "site", 2), first[:, :2])


def test_noise_is_drawn_in_blocks_and_does_not_depend_on_them(monkeypatch):
    of = tokens_of([5, 0, 32], [11, 3, 22], None, Moment(seed=1, step=7))
    whole = noise.uniform(of, "layer", "site", 48)
    assert whole.shape == (37, 48)
    for block in (1, 48, 48 * 10, 48 * 37):
        monkeypatch.setattr(noise, "BLOCK", block)
        assert torch.equal(noise.uniform(of, "layer", "site", 48), whole)
    assert torch.equal(
        noise.uniform(of, "layer", "site", 48, torch.float32), whole.to(torch.float32)
    )


def test_jitter_needs_little_more_memory_than_its_factors():
    of = tokens_of([3000], [11])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        factors = noise.jitter(of, "layer", 2048, 0.1, torch.float32)
    held = most = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert factors.min() >= 0.9 and factors.max() <= 1.1
    assert factors.nbytes == 3000 * 2048 * 4
    assert factors.nbytes < most < 3 * factors.nbytes


@pytest.mark.parametrize(
    "other",
    [
        noise.uniform(tokens_of([2000], [1], None, Moment(seed=2)), "a", "b", 8),
        noise.uniform(tokens_of([2000], [1], None, Moment(step=1)), "a", "b", 8),
        noise.uniform(tokens_of([2000], [2]), "a", "b", 8),
        noise.uniform(tokens_of([2000], [1]), "c", "b", 8),
        noise.uniform(tokens_of([2000], [1]), "a", "c", 8),
    ],
    ids=["seed", "step", "sample", "layer", "site"],
)
def test_noise_is_another_for_another(other):
    one = noise.uniform(tokens_of([2000], [1]), "a", "b", 8)
    assert abs(torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]) < 0.03


def test_noise_has_its_distribution():
    of = tokens_of([400, 600], [name_key("x"), name_key("y")])
    u = noise.uniform(of, "a", "b", 100).flatten()
    assert u.min() > 0 and u.max() < 1
    ordered = u.sort().values
    ends = (torch.arange(len(u)) + 1) / len(u)
    assert (ordered - ends).abs().max() < 1.63 / math.sqrt(len(u))  # Kolmogorov-Smirnov, 1 %
    grid = u.view(1000, 100)
    for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.01
    g, n = noise.gumbel(of, "a", "b", 100), noise.normal(of, "a", "b", 100)
    assert g.mean() == pytest.approx(0.5772, abs=0.02) and g.var() == pytest.approx(
        math.pi**2 / 6, abs=0.04
    )
    assert n.mean() == pytest.approx(0, abs=0.02) and n.var() == pytest.approx(1, abs=0.02)
