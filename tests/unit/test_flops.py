"""The operation count against published figures and against PyTorch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titan_vlm.models.inputs import Batch
from titan_vlm.models.qwen3_vl.config import FLAVORS
from titan_vlm.models.qwen3_vl.flops import flops
from titan_vlm.models.qwen3_vl.model import Qwen3VL


@pytest.mark.parametrize(("flavor", "gflop"), [("30b-a3b", 23.0), ("235b-a22b", 148)])
def test_calibration_of_the_text_model_at_one_document_of_4096_tokens(flavor, gflop):
    per_token = flops(FLAVORS[flavor], [4096], []) / 4096 / 1e9
    assert per_token == pytest.approx(gflop, rel=0.02)


def test_equals_what_pytorch_counts_in_a_forward_pass():
    config = FLAVORS["debug"]
    model = Qwen3VL(config).double()
    grids, doc_lens = [(1, 4, 6), (2, 4, 4)], [20, 12]
    patches = sum(t * h * w for t, h, w in grids)
    batch = Batch(
        tokens_BS=torch.zeros(1, 32, dtype=torch.long),
        labels_BS=torch.zeros(1, 32, dtype=torch.long),
        positions_3BS=torch.zeros(3, 1, 32, dtype=torch.long),
        valid_BS=torch.ones(1, 32, dtype=torch.bool),
        doc_lens=doc_lens,
        pixels_NC=torch.zeros(patches, config.vision.patch_dim, dtype=torch.float64),
        grids=grids,
        visual_index_M=torch.arange(patches // 4),
    )
    # Attention as plain products, of which the counter sees every one.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(batch)
    text = config.text
    # The masked half of causal attention, which the plain products compute and a kernel skips.
    scores = sum(4 * length**2 for length in doc_lens)
    masked = text.num_layers * scores * text.num_heads * text.head_dim / 2
    assert flops(config, doc_lens, grids) / 3 + masked == pytest.approx(
        counter.get_total_flops(), rel=1e-9
    )


def test_documents_and_frames_do_not_attend_to_each_other():
    config = FLAVORS["debug_moe"]
    assert flops(config, [64, 64], []) < flops(config, [128], [])
    assert flops(config, [], [(2, 4, 4)]) == 2 * flops(config, [], [(1, 4, 4)])
    assert flops(config, [], [(2, 4, 4)]) < flops(config, [], [(1, 4, 8)])
    assert flops(config, [], []) == 0


def test_padding_is_no_document_of_a_sample():
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, 6:] = valid[1, :] = False
    batch = Batch(
        tokens_BS=torch.zeros(2, 8, dtype=torch.long),
        labels_BS=torch.zeros(2, 8, dtype=torch.long),
        positions_3BS=torch.zeros(3, 2, 8, dtype=torch.long),
        valid_BS=valid,
        doc_lens=[4, 2, 2, 8],
        pixels_NC=torch.zeros(0, 12),
        grids=[],
        visual_index_M=torch.zeros(0, dtype=torch.long),
    )
    assert batch.sample_lens == [4, 2]
