"""The demo tokenizer: reproducible, Qwen-like, and usable from an exported directory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from titan_vlm.data.tokenizer import DEMO_TOKENIZER, load_tokenizer, visual_token_ids
from titan_vlm.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_training_the_tokenizer_again_gives_identical_files(tmp_path):
    script = ROOT / "scripts" / "train_tokenizer.py"
    command = [sys.executable, str(script), "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    names = sorted(p.name for p in DEMO_TOKENIZER.iterdir())
    assert names == sorted(p.name for p in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (DEMO_TOKENIZER / name).read_bytes(), name


def test_digits_are_one_token_each_and_text_survives_the_round_trip(tokenizer):
    assert len(tokenizer) == 512
    assert tokenizer.tokenize("30627") == list("30627")
    text = "Ünïcode 漢字 \n\n  and 42 signs!?<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_found_by_name(tokenizer):
    ids = visual_token_ids(tokenizer)
    assert len({ids.image, ids.video, ids.vision_start, ids.vision_end}) == 4
    assert tokenizer.convert_ids_to_tokens(ids.image) == "<|image_pad|>"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_template_is_qwens_format_with_system_images_and_video(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "and"},
                {"type": "image"},
                {"type": "video"},
                {"type": "text", "text": "Same?"},
            ],
        },
        {"role": "assistant", "content": "Yes."},
    ]
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{image}and{image}{video}Same?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_exported_directory_loads_with_auto_tokenizer(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    # With a model's config beside it, transformers chooses the class from there.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe"}))
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\n<|image_pad|>What is 12 + 30?<|im_end|>\n"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template
    # The file itself, as other engines read it, agrees with the class made by transformers.
    raw = Tokenizer.from_file(str(DEMO_TOKENIZER / "tokenizer.json"))
    assert raw.encode(text).ids == tokenizer(text).input_ids


def test_unusable_tokenizer_directories_are_refused_in_one_line(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="no directory"):
        load_tokenizer(str(tmp_path / "nowhere"))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer(str(tmp_path))
