"""Greedy decoding of packed prompts against decoding each alone, by full forward passes."""

import pytest
import torch

from titan_vlm.inference.generate import Prompt, greedy
from titan_vlm.models.init import init_weights
from titan_vlm.models.inputs import Batch
from titan_vlm.models.moe.layer import moe_layers
from titan_vlm.models.qwen3_vl.config import FLAVORS
from titan_vlm.models.qwen3_vl.model import Qwen3VL


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Qwen3VL(FLAVORS["debug_moe"]).double()
    init_weights(model, 0, std=0.15)  # wide enough for answers to depend on the prompt
    return model.eval()


def make_prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for length, with_image in ((5, False), (12, True), (7, False), (20, True)):
        visual = torch.zeros(length, dtype=torch.bool)
        if with_image:
            visual[2:6] = True
        prompts.append(
            Prompt(
                tokens_L=torch.randint(0, 500, (length,), generator=generator),
                positions_3L=torch.arange(length).expand(3, length),
                visual_L=visual,
                pixels_NC=torch.randn(16 if with_image else 0, 1536, generator=generator),
                grids=[(1, 4, 4)] if with_image else [],
            )
        )
    return prompts


def alone(model, prompt: Prompt, steps: int) -> list[int]:
    """One prompt, one row, argmax of the last position."""
    tokens, new = prompt.tokens_L, []
    for _ in range(steps):
        length = len(tokens)
        batch = Batch(
            tokens_BS=tokens[None],
            labels_BS=torch.full((1, length), -100),
            positions_3BS=torch.arange(length).expand(3, 1, length),
            valid_BS=torch.ones(1, length, dtype=torch.bool),
            doc_lens=[length],
            pixels_NC=prompt.pixels_NC,
            grids=prompt.grids,
            visual_index_M=prompt.visual_L.nonzero().squeeze(-1),
        )
        with torch.no_grad():
            new.append(int(model(batch)[0, -1].argmax()))
        tokens = torch.cat((tokens, torch.tensor(new[-1:])))
    return new


@pytest.mark.parametrize("max_batch_tokens", [1, 20, 8192])
def test_packed_prompts_decode_as_each_alone(model, max_batch_tokens):
    expected = [alone(model, prompt, 4) for prompt in make_prompts()]
    given = greedy(model, make_prompts(), set(), 4, "cpu", max_batch_tokens)
    assert given == expected
    assert len({tuple(answer) for answer in given}) == 4


def test_a_stop_token_ends_its_prompt_only(model):
    free = greedy(model, make_prompts(), set(), 4, "cpu")
    stop = free[1][2]
    expected = [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert greedy(model, make_prompts(), {stop}, 4, "cpu") == expected


def test_decoding_counts_no_expert_load(model):
    before = {name: layer.router.load_E.clone() for name, layer in moe_layers(model).items()}
    greedy(model, make_prompts(), set(), 1, "cpu")
    assert all(
        torch.equal(layer.router.load_E, before[name]) for name, layer in moe_layers(model).items()
    )
