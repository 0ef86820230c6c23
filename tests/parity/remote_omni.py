"""What an export of OmniMoE answers where titan_vlm is not installed; run by test_omni_export.py.

python -I remote_omni.py JOB    JOB/jobs.json: directory, dtype, conversations with pictures' paths
                                JOB/answers.pt: what processor and model make of each
"""

import json
import sys
from pathlib import Path

sys.modules["titan_vlm"] = None  # whatever is installed: importing it fails

import torch  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

NEW_TOKENS = 4


def main(folder: Path) -> None:
    jobs = json.loads((folder / "jobs.json").read_text())
    answers = {name: answer(**job) for name, job in jobs.items()}
    torch.save(answers, folder / "answers.pt")


@torch.no_grad()
def answer(directory: str, dtype: str, conversations: list, prompts: list) -> dict:
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, trust_remote_code=True, dtype=getattr(torch, dtype), output_loading_info=True
    )
    model.eval()
    inputs = [prepare(processor, conversation, tokenize=True) for conversation in conversations]
    found = {
        "problems": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "inputs": [dict(x) for x in inputs],
        "logits": [model(**x).logits[0] for x in inputs],
        "hidden_positions": [positions_of(model, x) for x in inputs],
    }
    texts, pictures = zip(*(split(processor, c) for c in conversations), strict=True)
    flat = [path for paths in pictures for path in paths]
    for side in ("left", "right"):
        batch = processor(
            text=list(texts), images=flat, padding=True, padding_side=side, return_tensors="pt"
        )
        logits_BSV, valid_BS = model(**batch).logits, batch["attention_mask"].bool()
        found[side] = [x[valid] for x, valid in zip(logits_BSV, valid_BS, strict=True)]
    if not prompts:
        return found
    asked = [prepare(processor, prompt, True, add_generation_prompt=True) for prompt in prompts]
    found["generated"] = [generate(model, x) for x in asked]
    found["generated_without_cache"] = generate(model, asked[1], use_cache=False)
    texts, pictures = zip(*(split(processor, p, True) for p in prompts), strict=True)
    flat = [path for paths in pictures for path in paths]
    batch = processor(
        text=list(texts), images=flat, padding=True, padding_side="left", return_tensors="pt"
    )
    found["generated_together"] = generate(model, batch)
    return found | {"beams": beams(model, batch)}


def prepare(processor, conversation, tokenize: bool, **options):
    return processor.apply_chat_template(
        conversation, tokenize=tokenize, return_dict=True, return_tensors="pt", **options
    )


def split(processor, conversation, generation=False) -> tuple[str, list[str]]:
    """The text, and the pictures that it places."""
    text = processor.apply_chat_template(conversation, add_generation_prompt=generation)
    parts = [part for message in conversation for part in message["content"]]
    return text, [part["image"] for part in parts if part["type"] == "image"]


def positions_of(model, inputs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    code = sys.modules[type(model).__module__]
    return code.positions(model.config, ids, mask, inputs.get("image_grid_thw"))[:, 0]


def generate(model, inputs, **options):
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options
    )
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    return new if len(new) > 1 else new[0]


def beams(model, batch):
    """Two beams of which one goes nowhere: the rows' pictures must follow their rows."""
    several = model.generate(
        **batch,
        do_sample=False,
        num_beams=2,
        num_return_sequences=2,
        max_new_tokens=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return several.logits[0]  # [rows x 2, V]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
