"""An upcycled layer computes what the dense layer it was made of computes."""

import pytest
import torch

from titan_vlm.models.init import init_weights
from titan_vlm.models.layers.mlp import SwiGLU
from titan_vlm.models.moe.layer import MoE
from titan_vlm.models.moe.tokens import tokens_of
from titan_vlm.models.moe.upcycle import (
    ExpertWeights,
    add_noise,
    copy_experts,
    group_router,
    split_experts,
)

WIDTH, HIDDEN, TOKENS = 16, 24, 300
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def make_dense(dtype=torch.float64) -> SwiGLU:
    dense = SwiGLU(WIDTH, HIDDEN).to(dtype)
    init_weights(dense, 3, std=0.3)
    return dense.requires_grad_(False)


def matrices(dense: SwiGLU) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return dense.gate.weight, dense.up.weight, dense.down.weight


def make_layer(weights: ExpertWeights, top_k: int, router_ED: torch.Tensor | None = None) -> MoE:
    """A layer with these experts; without `router_ED`, a random router."""
    num_experts, hidden, width = weights.down.shape
    layer = MoE(width, hidden, num_experts, top_k).to(weights.down.dtype)
    init_weights(layer, 5, std=0.3)
    with torch.no_grad():
        layer.experts.gate_up.copy_(weights.gate_up)
        layer.experts.down.copy_(weights.down)
        if router_ED is not None:
            layer.router.weight.copy_(router_ED)
    return layer.requires_grad_(False)


def run(layer: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    return layer(x_TD, tokens_of([len(x_TD)]))


def chosen_experts(layer: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """[T, K]"""
    return layer.router(x_TD, tokens_of([len(x_TD)])).expert_ids_P.view(len(x_TD), -1)


def make_tokens(dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (8, 3), (5, 5)])
def test_copies_compute_what_the_dense_layer_did(experts, top_k):
    dense, x_TD = make_dense(), make_tokens()
    layer = make_layer(copy_experts(*matrices(dense), experts), top_k)
    torch.testing.assert_close(run(layer, x_TD), dense(x_TD), **EXACT)


SPLITS = [(2, 2, 2), (8, 2, 2), (12, 6, 3), (16, 8, 4), (64, 8, 8), (6, 4, 1), (24, 24, 24)]


@pytest.mark.parametrize(("experts", "top_k", "shards"), SPLITS)
def test_shards_compute_what_the_dense_layer_did(experts, top_k, shards):
    dense, x_TD = make_dense(), make_tokens()
    weights = split_experts(*matrices(dense), experts, shards)
    assert weights.gate_up.shape == (experts, WIDTH, 2 * HIDDEN // shards)
    assert weights.down.shape == (experts, HIDDEN // shards, WIDTH)
    router_ED = group_router(experts, top_k, shards, WIDTH, 0.5, 0, "router.weight")
    layer = make_layer(weights, top_k, router_ED)
    torch.testing.assert_close(run(layer, x_TD), dense(x_TD), **EXACT)
    weights_P = layer.router(x_TD, tokens_of([TOKENS])).weights_P
    if experts > top_k > shards:  # the result does not rest on equal weights
        assert weights_P.max() > 1.5 * weights_P.min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("experts", "top_k", "shards"), SPLITS)
def test_every_token_meets_every_shard_equally_often(experts, top_k, shards, dtype):
    weights = split_experts(*matrices(make_dense(dtype)), experts, shards)
    router_ED = group_router(experts, top_k, shards, WIDTH, 0.02, 1, "router.weight")
    layer = make_layer(weights, top_k, router_ED)
    shards_TK = chosen_experts(layer, make_tokens(dtype)) % shards
    met_TG = torch.nn.functional.one_hot(shards_TK, shards).sum(1)
    assert torch.equal(met_TG, torch.full_like(met_TG, top_k // shards))


def test_virtual_groups_share_the_tokens_between_them():
    """Random rows: no group gets all tokens, and different names give different rows."""
    router_ED = group_router(16, 4, 4, WIDTH, 0.02, 1, "router.weight")
    weights = split_experts(*matrices(make_dense()), 16, 4)
    chosen_TK = chosen_experts(make_layer(weights, 4, router_ED), make_tokens())
    assert len(chosen_TK.unique()) == 16
    assert torch.equal(router_ED, group_router(16, 4, 4, WIDTH, 0.02, 1, "router.weight"))
    assert not torch.equal(router_ED, group_router(16, 4, 4, WIDTH, 0.02, 1, "other.weight"))
    assert not torch.equal(router_ED, group_router(16, 4, 4, WIDTH, 0.02, 2, "router.weight"))


def test_experts_are_new_tensors():
    dense = make_dense()
    before = [m.clone() for m in matrices(dense)]
    for weights in (copy_experts(*matrices(dense), 1), split_experts(*matrices(dense), 4, 2)):
        for tensor in (*weights, *add_noise(weights, 0.1, 0, "experts")):
            assert tensor.is_contiguous()
            tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, matrices(dense), strict=True))


def test_noise_is_relative_to_each_matrix_and_moves_nothing_further_than_that():
    """gate, up and down differ a hundredfold in size; the noise does likewise."""
    dense = make_dense()
    gate, up, down = matrices(dense)
    weights = copy_experts(gate, up * 10, down * 100, 40)
    noisy = add_noise(weights, 0.05, 0, "experts")
    for before, after in (
        (weights.gate_up.chunk(2, -1)[0], noisy.gate_up.chunk(2, -1)[0]),
        (weights.gate_up.chunk(2, -1)[1], noisy.gate_up.chunk(2, -1)[1]),
        (weights.down, noisy.down),
    ):
        moved = (after - before) / before.square().mean().sqrt()
        assert abs(moved.std() / 0.05 - 1) < 0.03  # of 15,360 numbers
        assert abs(moved.mean()) < 0.05 * 0.03
        assert 0 < moved.abs().max() < 0.05 * 6


def test_noise_moves_the_output_in_proportion():
    dense, x_TD = make_dense(), make_tokens()
    copies, y_TD = copy_experts(*matrices(dense), 4), make_dense()(make_tokens())

    def moved(relative_std: float) -> float:
        layer = make_layer(add_noise(copies, relative_std, 0, "experts"), 2)
        return ((run(layer, x_TD) - y_TD).norm() / y_TD.norm()).item()

    assert moved(0.0) < 1e-10
    # Three matrices, each off by that much, in a product: about sqrt(3) of it, less the averaging.
    assert 0.5e-3 < moved(1e-3) < 3e-3
    assert abs(moved(1e-3) / moved(1e-4) - 10) < 0.1


def test_noise_is_a_function_of_seed_name_and_expert_alone():
    dense = make_dense()
    few, many = copy_experts(*matrices(dense), 3), copy_experts(*matrices(dense), 8)

    def noise(weights: ExpertWeights, seed=0, name="layers.0.experts") -> torch.Tensor:
        return add_noise(weights, 0.1, seed, name).down

    assert torch.equal(noise(many)[:3], noise(few))
    assert not torch.equal(noise(few)[0], noise(few)[1])
    assert not torch.equal(noise(few), noise(few, seed=1))
    assert not torch.equal(noise(few), noise(few, name="layers.1.experts"))
    # The same numbers in every dtype, rounded to it.
    low = ExpertWeights(*(tensor.bfloat16() for tensor in few))
    exact = ExpertWeights(*(tensor.float() for tensor in low))
    assert torch.equal(noise(low), noise(exact).bfloat16())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: split_experts(*m, 10, 5), "24 wide cannot be split in 5 equal shards"),
        (lambda m: split_experts(*m, 6, 4), "6 experts .* each of 4 shards"),
        (lambda m: split_experts(*m, 4, 0), "each of 0 shards"),
        (lambda m: copy_experts(*m, 0), "0 experts"),
        (lambda m: copy_experts(m[0], m[1], m[2].t(), 4), r"are not one SwiGLU layer"),
        (lambda m: group_router(8, 3, 2, WIDTH, 0.02, 0, ""), "top_k must be a multiple of 2"),
        (lambda m: group_router(8, 3, 3, WIDTH, 0.02, 0, ""), "8 experts"),
        (lambda m: add_noise(copy_experts(*m, 2), -0.1, 0, ""), "negative size, -0.1"),
    ],
)
def test_what_cannot_be_built_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(matrices(make_dense()))
