"""A small dense Qwen3 and a small SigLIP2 tower, each trained a minute by transformers alone:
what `omni_moe_debug.toml` is assembled from.

    scripts/make_omni_parts.py runs/omni_parts

    runs/omni_parts/text      answers questions about numbers: "3 4 Add the two digits." -> 7
    runs/omni_parts/vision    its pooled output tells the ten handwritten digits apart

Neither has seen what the other knows: answering questions about pictures is left to the run. The
same seed gives the same parts; parts that are there already are kept.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    set_seed,
)

from titan_vlm.data.digits import CELL, DigitsSource, draw
from titan_vlm.data.tokenizer import load_tokenizer

TEXT_STEPS, VISION_STEPS, BATCH = 400, 400, 64
PATCH = 8
IGNORED = -100


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Small parts for omni_moe_debug.toml")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--quick", action="store_true", help="hardly trained, in seconds")
    arguments = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    for name, make in (("text", make_text), ("vision", make_vision)):
        folder = arguments.directory / name
        if (folder / "config.json").exists():
            print(f"{folder} is there already")
            continue
        set_seed(0)
        model, figure = make(5 if arguments.quick else None)
        model.save_pretrained(folder)
        print(f"{folder}: {figure}")
    return 0


# ---------------------------------------------------------------------------- text


def make_text(steps: int | None) -> tuple[nn.Module, str]:
    """A decoder that answers questions about numbers; how many of 200 new ones it gets right."""
    tokenizer = load_tokenizer()
    config = Qwen3Config(
        vocab_size=640,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
    )
    model, rng = Qwen3ForCausalLM(config), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in steps_of(optimizer, steps or TEXT_STEPS):
        ids_BS, labels_BS = encode(tokenizer, [question(rng) for _ in range(BATCH)])
        model(input_ids=ids_BS, labels=labels_BS).loss.backward()
    ids_BS, labels_BS = encode(tokenizer, [question(rng) for _ in range(200)])
    with torch.no_grad():
        guesses_BS = model(input_ids=ids_BS).logits.argmax(-1)
    asked_BS = labels_BS[:, 1:] != IGNORED
    right_B = ((guesses_BS[:, :-1] == labels_BS[:, 1:]) | ~asked_BS).all(1)
    return model, f"{int(right_B.sum())} of 200 answers right"


def question(rng: random.Random) -> tuple[str, str]:
    """As the digits' questions (data/digits.py), with numbers in the place of pictures."""
    a, b = rng.randrange(10), rng.randrange(10)
    several = [rng.randrange(10) for _ in range(4)]
    digits = " ".join(map(str, several))
    return rng.choice(
        [
            (f"{a} Which digit is this?", str(a)),
            (f"{a} {b} Add the two digits.", str(a + b)),
            (f"{a} {b} Which digit is larger?", str(max(a, b))),
            (f"{digits} Read the row of digits.", "".join(map(str, several))),
            (f"{digits} Count the digit {a}.", str(several.count(a))),
        ]
    )


def encode(tokenizer, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, S] of conversations; padding behind them is not trained on."""
    rows = []
    for asked, answer in pairs:
        turns = [{"role": "user", "content": asked}]
        before = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": answer})
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        ids, given = (tokenizer(text)["input_ids"] for text in (whole, before))
        rows.append((ids, [IGNORED] * len(given) + ids[len(given) :]))
    longest = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    ids_BS = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    labels_BS = torch.tensor([y + [IGNORED] * (longest - len(y)) for _, y in rows])
    return ids_BS, labels_BS


# ---------------------------------------------------------------------------- vision


def make_vision(steps: int | None) -> tuple[nn.Module, str]:
    """A tower that tells digits apart, and how many of those it has not seen it gets right."""
    config = Siglip2VisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        patch_size=PATCH,
        num_patches=64,
    )
    model, head = Siglip2VisionModel(config), nn.Linear(96, 10)
    train, held = DigitsSource("train", 0), DigitsSource("validation", 0)
    rng = random.Random(0)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    for _ in steps_of(optimizer, steps or VISION_STEPS):
        chosen = [rng.randrange(len(train.scans)) for _ in range(BATCH)]
        pictures = [draw([[train.scans[k]]], CELL, rng.getrandbits(64)) for k in chosen]
        labels_B = torch.tensor([train.labels[k] for k in chosen])
        F.cross_entropy(head(pooled(model, pictures)), labels_B).backward()
    with torch.no_grad():
        pictures = [draw([[scan]], CELL, None) for scan in held.scans]
        guesses_B = head(pooled(model, pictures)).argmax(-1)
    right = (guesses_B == torch.tensor(held.labels)).sum()
    return model, f"{int(right)} of {len(held.scans)} unseen digits told right"


def pooled(model: nn.Module, pictures: list) -> Tensor:
    """[B, D] of grey square pictures of one size."""
    values_BHW = torch.from_numpy(np.stack([np.asarray(x) for x in pictures])).float() / 127.5 - 1
    side = values_BHW.shape[1] // PATCH
    patches = values_BHW.unflatten(2, (side, PATCH)).unflatten(1, (side, PATCH))
    patches = patches.transpose(2, 3).flatten(1, 2).unsqueeze(-1).expand(-1, -1, -1, -1, 3)
    many = len(pictures)
    return model(
        patches.flatten(2),
        torch.ones(many, side**2, dtype=torch.int64),
        torch.tensor([[side, side]] * many),
    ).pooler_output


def steps_of(optimizer: torch.optim.Optimizer, steps: int):
    """Loops `steps` times around forward and backward, and updates; the rate falls to zero."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps):
        yield step
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
