"""Every balance loss against its formula in loops: value, gradients on the gate and on tokens."""

import math

import pytest
import torch

from tests.routing_cases import (
    EXPERTS,
    LENS,
    TOP_K,
    best,
    hidden,
    pairs,
    router,
    sequences,
    tokens,
)
from titan_vlm.models.moe import noise
from titan_vlm.models.moe.router import SUMS
from titan_vlm.models.moe.tokens import Moment

LOSS = 0.7  # coefficient


def probabilities(made, x_TD, of):
    logits_VE = x_TD[of.index_V] @ made.weight.T
    if made.config.score != "sigmoid":
        return logits_VE, [list(row.softmax(0)) for row in logits_VE]
    scores = [list(torch.sigmoid(row)) for row in logits_VE]
    return logits_VE, [[s / sum(row) for s in row] for row in scores]


def switch(probs, members):
    """E sum_e f_e P_e over some tokens: f_e of the un-biased top-k, balanced at 1."""
    pairs_of = [0] * EXPERTS
    for v in members:
        for e in best([p.item() for p in probs[v]], TOP_K):
            pairs_of[e] += 1
    total = torch.zeros((), dtype=torch.float64)
    for e in range(EXPERTS):
        mean = sum((probs[v][e] for v in members), total * 0) / max(len(members), 1)
        total = total + EXPERTS * pairs_of[e] / max(TOP_K * len(members), 1) * mean
    return total


def aux_loss(made, x_TD, of):
    return switch(probabilities(made, x_TD, of)[1], range(len(of)))


def sequence_loss(made, x_TD, of):
    probs = probabilities(made, x_TD, of)[1]
    groups = [members for members in sequences(of) if members]
    return sum((switch(probs, g) for g in groups), torch.zeros(())) / max(len(groups), 1)


def z_loss(made, x_TD, of):
    logits_VE, _ = probabilities(made, x_TD, of)
    squares = [torch.log(sum(torch.exp(x) for x in row)) ** 2 for row in logits_VE]
    return sum(squares, torch.zeros(())) / max(len(of), 1)


def importance_of(made, x_TD, of):
    """Summed weights and number of pairs of each expert, from the routing itself."""
    plain = router(**{k: v for k, v in vars(made.config).items() if not k.endswith("_loss")})
    plain.load_state_dict(made.state_dict())
    plain.weight = made.weight
    routing = plain(x_TD, of)
    importance = [torch.zeros((), dtype=torch.float64) for _ in range(EXPERTS)]
    number = [0] * EXPERTS
    for (_, e), w in zip(pairs(routing), routing.weights_P, strict=True):
        importance[e] = importance[e] + w
        number[e] += 1
    return importance, number


def importance_loss(made, x_TD, of):
    importance, number = importance_of(made, x_TD, of)
    total, all_pairs = sum(importance), max(sum(number), 1)
    if not len(of):
        return torch.zeros(())
    return EXPERTS * sum(i / total * n / all_pairs for i, n in zip(importance, number, strict=True))


FORMULAS = {
    "aux_loss": aux_loss,
    "sequence_loss": sequence_loss,
    "z_loss": z_loss,
    "importance_loss": importance_loss,
}


def value_of(made, name):
    return made.sums[SUMS.index(name)].item() / made.sums[SUMS.index("micro_batches")].item()


def gradients(made, x_TD, of, moment=None):
    """Of the injected loss alone: the weights' own gradient is 0."""
    of.moment = moment or of.moment
    routing = made(x_TD, of)
    found = torch.autograd.grad(
        routing.weights_P.sum() * 0.0, [x_TD, *made.parameters()], allow_unused=True
    )
    inputs = [x_TD, *made.parameters()]
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["random", "hot", "ties"])
@pytest.mark.parametrize("case", LENS)
@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient(name, case, kind, score):
    made = router(score=score, **{name: LOSS})
    of, x_TD = tokens(case), hidden(case, kind)
    ours = gradients(made, x_TD, of)
    expected = FORMULAS[name](made, x_TD, of)
    assert value_of(made, name) == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    inputs = [x_TD, *made.parameters()]
    theirs = [torch.zeros_like(x) for x in inputs]
    if expected.requires_grad:
        found = torch.autograd.grad(LOSS * expected, inputs, allow_unused=True)
        theirs = [
            torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)
        ]
    if len(of) > 9 and kind == "random":
        assert max(g.abs().max() for g in ours) > 1e-4
    assert_same(ours, theirs)


def test_several_losses_add_up():
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding")
    together = gradients(router(**dict.fromkeys(FORMULAS, LOSS)), x_TD, of)
    alone = [gradients(router(**{name: LOSS}), x_TD, of) for name in FORMULAS]
    assert_same(together, [sum(parts) for parts in zip(*alone, strict=True)])


def test_the_losses_of_learned_noise():
    """Squared variation of importance and of the smooth load (Shazeer 2017, appendix A)."""
    settings = {"router": "noisy_topk", "score": "softmax_topk"}
    made = router(**settings, cv_importance=LOSS, cv_load=0.3)
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding")
    ours = gradients(made, x_TD, of)
    x_VD = x_TD[of.index_V]
    clean_VE = x_VD @ made.weight.T
    std_VE = torch.log1p(torch.exp(x_VD @ made.noise_weight.T))
    noisy_VE = clean_VE + std_VE * noise.normal(of, "here", "topk", EXPERTS)
    importance = [torch.zeros((), dtype=torch.float64) for _ in range(EXPERTS)]
    load = [torch.zeros((), dtype=torch.float64) for _ in range(EXPERTS)]
    for v in range(len(of)):
        chosen = best(noisy_VE[v].tolist(), TOP_K)
        for e, w in zip(chosen, noisy_VE[v, chosen].softmax(0), strict=True):
            importance[e] = importance[e] + w
        for e in range(EXPERTS):
            others = sorted((noisy_VE[v, o] for o in range(EXPERTS) if o != e), reverse=True)
            z = (clean_VE[v, e] - others[TOP_K - 1]) / std_VE[v, e]
            load[e] = load[e] + 0.5 * (1 + torch.erf(z / math.sqrt(2)))

    def variation(values):
        mean = sum(values) / EXPERTS
        return sum((x - mean) ** 2 for x in values) / EXPERTS / mean**2

    assert value_of(made, "cv_importance") == pytest.approx(variation(importance).item())
    assert value_of(made, "cv_load") == pytest.approx(variation(load).item())
    total = LOSS * variation(importance) + 0.3 * variation(load)
    assert_same(ours, torch.autograd.grad(total, [x_TD, *made.parameters()]))
    assert all(g.abs().max() > 1e-6 for g in ours)


def test_noise_that_has_died_out_leaves_gradients_finite():
    made = router(router="noisy_topk", score="softmax_topk", cv_load=LOSS).float()
    with torch.no_grad():
        made.noise_weight.fill_(-10.0)
    x_TD = 1 + 0.1 * hidden("three documents and padding").detach().float()
    made(x_TD, tokens("three documents and padding")).weights_P.sum().backward()
    assert made.weight.grad.isfinite().all() and made.noise_weight.grad.isfinite().all()


def test_the_losses_count_the_choice_without_bias_and_the_load_the_one_that_was_made():
    made = router(score="sigmoid", aux_loss=LOSS, bias_update="sign")
    made.steering.bias_E[3] = 10.0  # everybody's choice
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding")
    gradients(made, x_TD, of)
    assert value_of(made, "aux_loss") == pytest.approx(aux_loss(made, x_TD, of).item())
    assert made.load_E[3] == len(of)
    assert made.steering.pending[3] == len(of)


def test_the_batch_loss_averages_pairs_over_the_micro_batches_so_far():
    """Qwen's global batch: the second micro-batch is judged by the pairs of both."""
    first, second = hidden("three documents and padding"), hidden("fewer tokens than experts")
    of_first, of_second = tokens("three documents and padding"), tokens("fewer tokens than experts")
    made = router(aux_loss=LOSS)
    ours = [
        gradients(made, first, of_first, Moment(micro_batch=0, micro_batches=2)),
        gradients(made, second, of_second, Moment(micro_batch=1, micro_batches=2)),
    ]
    counts = [0] * EXPERTS
    for x_TD, of, given in ((first, of_first, ours[0]), (second, of_second, ours[1])):
        probs = probabilities(made, x_TD, of)[1]
        for row in probs:
            for e in best([p.item() for p in row], TOP_K):
                counts[e] += 1
        share = [n / sum(counts) for n in counts]
        mean = [sum(row[e] for row in probs) / len(of) for e in range(EXPERTS)]
        loss = EXPERTS * sum(f * p for f, p in zip(share, mean, strict=True))
        wanted = torch.autograd.grad(LOSS * loss / 2, [x_TD, made.weight])
        assert_same(given, wanted)
    of_first.moment = Moment(micro_batch=0, micro_batches=2)  # the next step begins anew
    of_first.memo.clear()
    made(first, of_first)
    assert made.seen_E.sum() == TOP_K * len(of_first)


def test_a_coefficient_follows_its_curve():
    made = router(aux_loss=2.0, anneal=anneal(aux_loss={"10": 1.0, "20": 0.0}))
    steps = {0: 2.0, 10: 2.0, 15: 1.0, 20: 0.0, 99: 0.0}
    assert {step: made.config.coefficient("aux_loss", step) for step in steps} == steps
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding")
    whole = gradients(router(aux_loss=2.0), x_TD, of)
    half = gradients(made, x_TD, of, Moment(step=15))
    assert_same(half, [g / 2 for g in whole])


def anneal(**curves):
    from titan_vlm.models.moe.config import Anneal

    return Anneal(**curves)


def test_nothing_is_counted_twice_when_a_layer_is_run_again():
    from torch.utils.checkpoint import checkpoint

    settings = {"score": "sigmoid", "bias_update": "sign", "aux_loss": LOSS, "sequence_loss": 0.2}
    of, x_TD = tokens("three documents and padding"), hidden("three documents and padding")
    made, again = router(**settings), router(**settings)

    def weights(gate, x_TD, of):
        return gate(x_TD, of).weights_P.sin()  # running again goes on to what this saves

    for gate in (made, again):
        gate(x_TD[:3], tokens("fewer tokens than experts"))  # a micro-batch before
    of.moment = Moment(micro_batch=1, micro_batches=2)
    plain = weights(made, x_TD, of)
    wanted = torch.autograd.grad((plain * plain).sum(), [x_TD, made.weight])
    of = tokens("three documents and padding")
    of.moment = Moment(micro_batch=1, micro_batches=2)
    rerun = checkpoint(weights, again, x_TD, of, use_reentrant=False)
    assert_same(torch.autograd.grad((rerun * rerun).sum(), [x_TD, again.weight]), wanted)
    for name in ("load_E", "sums", "seen_E", "steering.pending"):
        assert torch.equal(again.get_buffer(name), made.get_buffer(name)), name
    assert made.load_E.sum() == TOP_K * (len(of) + 3)


def test_evaluation_counts_nothing_and_has_no_losses():
    made = router(aux_loss=LOSS, score="sigmoid", bias_update="sign").eval()
    made(hidden("three documents and padding"), tokens("three documents and padding"))
    assert not made.load_E.any() and not made.sums.any() and not made.steering.pending.any()


def test_the_coefficient_of_transformers_times_k_over_layers_is_ours():
    """It takes all layers for one; where they are alike, ours add up to the same."""
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    made, layers, coefficient = router(aux_loss=LOSS), 3, 0.001
    case = "three documents and padding"
    x_TD, of = hidden(case), tokens(case)
    made(x_TD, of)
    logits_VE = (x_TD[of.index_V] @ made.weight.T).detach()
    theirs = load_balancing_loss_func((logits_VE,) * layers, EXPERTS, TOP_K)
    ours = layers * (coefficient * TOP_K / layers) * value_of(made, "aux_loss")
    assert ours == pytest.approx(coefficient * theirs.item(), rel=1e-6)
