"""Tokenizers: any Hugging Face directory, or the embedded one of the demo.

The demo's tokenizer is a byte-level BPE of 512 entries in Qwen's manner, written by
scripts/train_tokenizer.py. Ids of special tokens are always looked up by name.
"""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError

from titan_vlm.errors import ConfigError

DEMO_TOKENIZER = Path(__file__).parent / "demo_tokenizer"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


@dataclass(frozen=True)
class VisualTokenIds:
    image: int
    video: int
    vision_start: int
    vision_end: int


def load_tokenizer(path: str = ""):
    """The fast tokenizer of a directory; "" is the embedded demo tokenizer."""
    from transformers import AutoTokenizer

    directory = Path(path) if path else DEMO_TOKENIZER
    if not directory.is_dir():
        raise ConfigError(f"data.tokenizer: {path} is no directory with a Hugging Face tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.tokenizer: {directory} holds no usable tokenizer: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"data.tokenizer: {directory} has no tokenizer.json (a fast tokenizer)")
    if not tokenizer.chat_template:
        raise ConfigError(f"data.tokenizer: {directory} has no chat template")
    visual_token_ids(tokenizer)
    _check_template(tokenizer, directory)
    # What a tokenizer.json may carry along; samples would be cut without a word.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _check_template(tokenizer, directory: Path) -> None:
    """A template made for text alone leaves out, or breaks on, content that is a list of parts."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": f"probe of {role}"}]}
        for role in ("user", "assistant")
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        text = str(error)
    if "probe of user" not in text or "probe of assistant" not in text:
        raise ConfigError(
            f"data.tokenizer: {directory}: the chat template does not render content that is a "
            f"list of parts (got {text!r:.80}); use the template of a vision-language model"
        )


def visual_token_ids(tokenizer) -> VisualTokenIds:
    """Ids of the tokens that stand for, and surround, pictures."""
    names = (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END)
    vocabulary = tokenizer.get_vocab()
    missing = [name for name in names if name not in vocabulary]
    if missing:
        raise ConfigError(f"data.tokenizer: the vocabulary has no {', '.join(missing)}")
    return VisualTokenIds(*(vocabulary[name] for name in names))
