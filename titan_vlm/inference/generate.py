"""Greedy decoding of many prompts at once, by the same packed forward pass that trains.

All unfinished prompts lie in one row, each a document, and every step runs the whole row again:
no cache to keep right, no padding, and exactly the numbers of training. Meant for the short answers
of a validation.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from titan_vlm.models.inputs import IGNORE_LABEL, Batch
from titan_vlm.models.layers.head import logits


@dataclass
class Prompt:
    """One prompt of L tokens and what was generated after it."""

    tokens_L: Tensor
    positions_3L: Tensor
    visual_L: Tensor  # bool: which tokens stand for pixels
    pixels_NC: Tensor
    grids: list[tuple[int, int, int]]
    new_tokens: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens_L) + len(self.new_tokens)


@torch.no_grad()
def greedy(
    model: nn.Module,
    prompts: list[Prompt],
    stop_ids: set[int],
    max_new_tokens: int,
    device: torch.device | str,
    max_batch_tokens: int = 8192,
) -> list[list[int]]:
    """The most likely continuation of every prompt, without the stop token that ended it.

    Args:
        stop_ids: tokens that end an answer.
        max_batch_tokens: prompts that share a forward pass hold at most so many tokens together
            (a longer prompt runs alone).
    """
    for group in _groups(prompts, max_batch_tokens):
        active = group
        for _ in range(max_new_tokens):
            batch = _pack(active).to(device)
            ends = torch.tensor([len(p) for p in active]).cumsum(0).to(device) - 1
            logits_PV = model(batch, lambda h, w, ends=ends: logits(h[0, ends], w))
            going_on = []
            for prompt, token in zip(active, logits_PV.argmax(-1).tolist(), strict=True):
                if token not in stop_ids:
                    prompt.new_tokens.append(token)
                    going_on.append(prompt)
            active = going_on
            if not active:
                break
    return [prompt.new_tokens for prompt in prompts]


def _groups(prompts: list[Prompt], max_batch_tokens: int) -> list[list[Prompt]]:
    groups: list[list[Prompt]] = []
    room = 0
    for prompt in prompts:
        if not groups or len(prompt) > room:
            groups.append([])
            room = max_batch_tokens
        groups[-1].append(prompt)
        room -= len(prompt)
    return groups


def _pack(prompts: list[Prompt]) -> Batch:
    """All prompts with what they have generated so far, as one row without padding."""
    tokens, positions, visual = [], [], []
    for p in prompts:
        new = len(p.new_tokens)
        tokens += [p.tokens_L, torch.tensor(p.new_tokens, dtype=torch.int64)]
        after = p.positions_3L.max() + 1 + torch.arange(new)
        positions += [p.positions_3L, after.expand(3, new)]
        visual += [p.visual_L, torch.zeros(new, dtype=torch.bool)]
    tokens_BS = torch.cat(tokens).unsqueeze(0)
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=torch.full_like(tokens_BS, IGNORE_LABEL),
        positions_3BS=torch.cat(positions, 1).unsqueeze(1),
        valid_BS=torch.ones_like(tokens_BS, dtype=torch.bool),
        doc_lens=[len(p) for p in prompts],
        pixels_NC=torch.cat([p.pixels_NC for p in prompts]),
        grids=[grid for p in prompts for grid in p.grids],
        visual_index_M=torch.cat(visual).nonzero().squeeze(-1),
        num_samples=len(prompts),
        num_images=sum(len(p.grids) for p in prompts),
    )
