"""An export of OmniMoE answers in transformers, without titan_vlm, as the model does here.

One process that cannot import titan_vlm loads every case below by AutoProcessor and
AutoModelForImageTextToText (remote_omni.py). Pixels and token ids must be the same to the last bit;
logits of conversations by themselves and as a padded batch equal ours in packed rows:

    float32    1e-5
    float64    1e-10
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from titan_vlm.assembly import Parts, assemble, export
from titan_vlm.config import load_config
from titan_vlm.data.chat import Encoder
from titan_vlm.data.images import visual_spec
from titan_vlm.data.rows import collate, make_row
from titan_vlm.data.sample import ImageRef, RawSample, image_part, open_file, text_part
from titan_vlm.evaluation.validate import make_prompt
from titan_vlm.inference.generate import greedy
from titan_vlm.models.init import init_weights
from titan_vlm.models.moe.steering import Steering
from titan_vlm.models.registry import model_config

REMOTE = Path(__file__).with_name("remote_omni.py")
NEW_TOKENS = 4
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
TEXT = {"experts": 8, "top_k": 2, "expert_width": 32}
SMALL = {"experts": 4, "top_k": 2, "expert_width": 24}
LEVELS = "1:0,2:1,pooled:2"

# A case: settings of [projector] and [moe.*], and whether pictures are squares.
CASES = {
    "merge-topk": (
        {"projector.levels": LEVELS},
        {
            "text": TEXT,
            "vision": SMALL
            | {"layers": "1,3", "top_k": 1, "activation": "gelu", "expert_bias": "true"},
            "projector": SMALL | {"activation": "gelu"},
        },
        False,
    ),
    "none-sigmoid-bias-groups-shared": (
        {"projector.levels": "0:1,2:1", "projector.reduction": "none"},
        {
            "text": TEXT
            | {"score": "sigmoid", "bias_update": "sign", "n_groups": 4, "topk_groups": 2}
            | {"shared_width": 40, "shared_gate": "true", "route_scale": 1.5, "layers": "1,2"},
            "vision": SMALL | {"router": "expert_choice", "capacity_factor": 1.0, "ec_chunk": 7},
            "projector": SMALL | {"router": "threshold", "score": "sigmoid", "expert_bias": "true"},
        },
        False,
    ),
    "resampler-noisy-fixed": (
        {"projector.reduction": "resampler", "projector.levels": LEVELS, "projector.tokens": 5},
        {
            "text": TEXT | {"router": "noisy_topk", "score": "softmax_topk"},
            "vision": SMALL | {"normalize": "false", "bias_update": "quantile"},
            "projector": SMALL | {"router": "expert_choice", "capacity_factor": 0.5},
        },
        True,
    ),
    "qformer-threshold-depth": (
        {"projector.reduction": "qformer", "projector.levels": LEVELS, "projector.depth": 1}
        | {"projector.tokens": 3, "projector.layers": 3},
        {"text": TEXT | {"router": "threshold"}},
        False,
    ),
    "dense-1d": ({"projector.positions": "1d"}, {"text": {"aux_loss": 0}}, False),
}


def parts_of(case: str) -> Parts:
    projector, branches, square = CASES[case]
    settings = {"model.name": "omni", "model.flavor": "debug", "data.max_pixels": 5000} | projector
    for branch, moe in branches.items():
        settings |= {f"moe.{branch}.{key}": value for key, value in moe.items()}
    if "positions" not in str(projector) and projector.get("projector.tokens"):
        settings["projector.positions"] = "1d"
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    config = load_config("qwen_vlm_moe.toml", words)
    parts = assemble(config)
    dims = replace(parts.dims, vision=replace(parts.dims.vision, naflex=not square))
    return replace(parts, dims=dims, images=visual_spec(config.data, **parts.spec.visual(dims)))


def randomized(parts: Parts, seed: int = 0):
    """A model of weights as large as trained ones, and routers that have learnt to balance."""
    model = parts.spec.build(parts.dims)
    init_weights(model, seed, 0.12)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.empty(parameter.shape).normal_(0, 0.05, generator=generator)
    for module in model.modules():
        if isinstance(module, Steering):
            for name, buffer in module.named_buffers():
                if name == "threshold_E":
                    middle = 0.5 if module.sigmoid else 1 / len(buffer)
                    buffer.copy_(
                        middle * (1 + 0.6 * (torch.rand(len(buffer), generator=generator) - 0.5))
                    )
                elif name == "steps":
                    buffer.fill_(3)
                elif name != "pending":
                    buffer.copy_(0.4 * torch.rand(len(buffer), generator=generator) - 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Of odd sizes, one transparent, one grey, one stored turned."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    shapes = {"a.png": (45, 70, 3), "b.png": (64, 40, 4), "c.png": (90, 100), "d.jpg": (60, 33, 3)}
    for name, shape in shapes.items():
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(folder / name, **({"exif": exif} if name.endswith("jpg") else {}))
    return [folder / name for name in shapes]


def conversations(pictures: list[Path]) -> list[list[dict]]:
    """As transformers takes them: a text, a picture, several of them."""
    a, b, c, d = ({"type": "image", "image": str(path)} for path in pictures)

    def says(role, *parts):
        content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
        return {"role": role, "content": content}

    return [
        [says("user", "How many digits are there?"), says("assistant", "Ten.")],
        [says("user", a, "Which digit?"), says("assistant", "Seven or 1.")],
        [
            says("user", "First ", b, " then ", c, d, " which?"),
            says("assistant", "None of them"),
            says("user", "Sure?", a),
            says("assistant", "Yes."),
        ],
    ]


def raw_samples(conversations: list[list[dict]]) -> list[RawSample]:
    """The same as a source hands them out."""

    def part(p):
        if p["type"] == "text":
            return text_part(p["text"])
        return image_part(ImageRef(p["image"], partial(open_file, p["image"])))

    return [
        RawSample(str(i), [m | {"content": list(map(part, m["content"]))} for m in turns], str(i))
        for i, turns in enumerate(conversations)
    ]


@pytest.fixture(scope="module")
def remote(tmp_path_factory, pictures) -> dict:
    """Of every case what transformers answers."""
    folder, asked = tmp_path_factory.mktemp("remote"), conversations(pictures)
    jobs = {}
    for case in CASES:
        parts = parts_of(case)
        export(parts, randomized(parts).state_dict(), folder / case, "float32")
        for dtype in TOLERANCE:
            jobs[f"{case} {dtype}"] = {
                "directory": str(folder / case),
                "dtype": dtype,
                "conversations": asked,
                "prompts": [turns[:-1] for turns in asked if dtype == "float32"],
            }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", str(REMOTE), str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "answers.pt")


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_processor_and_model_answer_as_ours(remote, pictures, case, dtype):
    parts, answers = parts_of(case), remote[f"{case} {dtype}"]
    model = randomized(parts).to(getattr(torch, dtype))
    encoder = Encoder(parts.tokenizer, parts.images)
    raws = raw_samples(conversations(pictures))
    samples = [encoder.encode(raw) for raw in raws]
    row = collate([make_row(samples, sum(map(len, samples)) + 9, encoder)])
    with torch.no_grad():
        logits = model(row)[0].split(row.doc_lens)

    assert answers["problems"] == {}
    for i, sample in enumerate(samples):
        inputs = answers["inputs"][i]
        assert inputs["input_ids"][0].tolist() == sample.tokens_L.tolist()
        assert answers["hidden_positions"][i].tolist() == sample.positions_3L.tolist()
        if sample.visuals:
            pixels = np.concatenate([visual.pixels(parts.images) for visual in sample.visuals])
            assert torch.equal(inputs["pixel_values"], torch.from_numpy(pixels))
            assert inputs["image_grid_thw"].tolist() == [list(v.grid) for v in sample.visuals]
        for how in ("logits", "left", "right"):
            assert error(answers[how][i], logits[i]) < TOLERANCE[dtype], (how, i)


@pytest.mark.parametrize("case", CASES)
def test_generate_gives_our_tokens_with_and_without_cache_and_in_a_batch(remote, pictures, case):
    parts, answers = parts_of(case), remote[f"{case} float32"]
    encoder = Encoder(parts.tokenizer, parts.images)
    asked = [raw.messages[:-1] for raw in raw_samples(conversations(pictures))]
    ours = greedy(
        randomized(parts), [make_prompt(encoder, x) for x in asked], set(), NEW_TOKENS, "cpu"
    )
    # transformers never says the token that ends an answer before the least number of tokens.
    compared = [tokens for tokens in ours if parts.tokenizer.eos_token_id not in tokens]
    assert compared
    for key in ("generated", "generated_together"):
        for mine, theirs in zip(ours, answers[key], strict=True):
            assert mine not in compared or mine == theirs, key
    assert answers["generated_without_cache"] == answers["generated"][1]


@pytest.mark.parametrize("case", CASES)
def test_beams_keep_their_pictures(remote, case):
    logits = remote[f"{case} float32"]["beams"]
    both = logits.unflatten(0, (-1, 2))
    assert error(both[:, 0], both[:, 1]) < 1e-5
    assert error(both[0, 0], both[1, 0]) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_read_back_bit_for_bit(case, tmp_path):
    parts = parts_of(case)
    model = randomized(parts, seed=1)
    export(parts, model.state_dict(), tmp_path / "hf", "float32")
    config = model_config("omni", "hf", str(tmp_path / "hf"))
    assert config == parts.dims
    again = parts.spec.build(config)
    init_weights(again, 2, 0.1)
    parts.spec.load_hf(again, tmp_path / "hf")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
