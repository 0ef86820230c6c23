"""The model equals transformers' own: logits, loss and the gradient of every parameter.

transformers makes and saves random weights, we load them with `load_hf`. The reference runs each
document by itself, without packing and padding; ours runs packed rows.

    type       logits    gradients
    float32    1e-5      1e-4
    float64    1e-10     1e-9         with transformers' casts to float32 lifted

Errors are max|a - b| / max(max|b|, floor).
"""

import pytest
import torch

from scripts.hf_reference import (
    ask_ours,
    ask_reference,
    compare,
    load_reference,
    make_document,
    new_reference,
    pack,
    random_picture,
    tiny_config,
)
from titan_vlm.models.qwen3_vl.hf import load_hf, read_config
from titan_vlm.models.qwen3_vl.model import Qwen3VL

TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-10, 1e-9)}
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module", params=["dense", "moe", "moe-sparse-step-tied"])
def saved(request, tmp_path_factory):
    """A directory that transformers saved, and its dimensions."""
    config = {
        "dense": tiny_config(moe=False),
        "moe": tiny_config(moe=True),
        "moe-sparse-step-tied": tiny_config(
            moe=True, tied=True, mlp_only_layers=(), decoder_sparse_step=2, attention_bias=True
        ),
    }[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    new_reference(config).save_pretrained(directory)
    assert read_config(directory) == config
    return directory, config


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def both(request, saved):
    """(reference, ours) of the same weights."""
    directory, config = saved
    ours = Qwen3VL(config).to(request.param)
    load_hf(ours, directory)
    return load_reference(directory, request.param), ours


def documents(config):
    """One of every kind. No size of a picture divides the table of positions evenly."""

    def picture(kind, grid, seed):
        return random_picture(config, kind, grid, seed)

    return {
        "text": make_document(config, [], 1),
        "one image": make_document(config, [picture("image", (1, 4, 6), 2)], 2),
        "several images of odd sizes": make_document(
            config,
            [
                picture("image", (1, 2, 2), 3),
                picture("image", (1, 6, 10), 4),
                picture("image", (1, 14, 4), 5),
            ],
            3,
        ),
        "video": make_document(config, [picture("video", (3, 4, 6), 6)], 4),
        "video and image": make_document(
            config, [picture("video", (2, 6, 4), 7), picture("image", (1, 4, 4), 8)], 5
        ),
    }


def check(both, rows, length):
    reference, ours = both
    dtype = next(ours.parameters()).dtype
    flat = [document for row in rows for document in row]
    errors = compare(
        ask_ours(ours, pack(rows, length, ours.config, reference)),
        ask_reference(reference, flat),
        FLOOR[dtype],
    )
    for_logits, for_gradients = TOLERANCE[dtype]
    assert len(errors.logits) == len(flat)
    assert max(errors.logits.values()) < for_logits, errors.logits
    assert errors.loss < for_logits
    wrong = {name: e for name, e in errors.gradients.items() if e >= for_gradients}
    assert not wrong, wrong


@pytest.mark.parametrize(
    "kind", ["text", "one image", "several images of odd sizes", "video", "video and image"]
)
def test_one_document_equals_transformers(both, kind):
    document = documents(both[1].config)[kind]
    check(both, [[document]], len(document.tokens_S))


def test_a_packed_batch_equals_transformers_document_by_document(both):
    docs = list(documents(both[1].config).values())
    rows = [[docs[0], docs[1], docs[3]], [docs[2]], [docs[4], make_document(both[1].config, [], 9)]]
    lengths = [sum(len(d.tokens_S) for d in row) for row in rows]
    check(both, rows, max(lengths) + 5)


def test_every_parameter_is_reached_by_the_comparison(both):
    """A gradient that is zero everywhere would compare equal to anything that is zero."""
    answer = ask_reference(both[0], list(documents(both[1].config).values()))
    untouched = [name for name, gradient in answer.gradients.items() if not gradient.any()]
    assert not untouched


def test_the_lift_of_casts_is_what_makes_float64_exact(saved):
    """Without it the reference in float64 is only as exact as float32; with it the test above
    holds. Otherwise 1e-10 would say nothing about the code that transformers casts."""
    directory, config = saved
    document = documents(config)["one image"]
    ours = Qwen3VL(config).double()
    load_hf(ours, directory)
    reference = load_reference(directory, torch.float64)
    exact = ask_ours(ours, pack([[document]], 64, config, reference))
    inputs = {"input_ids": document.tokens_S[None], "image_grid_thw": torch.tensor(document.grids)}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    with torch.no_grad():
        cast = reference(pixel_values=document.pixels_NC, **inputs).logits[0]
    error = (cast - exact.logits[0]).abs().max() / cast.abs().max()
    assert 1e-9 < error < 1e-5
