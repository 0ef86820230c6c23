"""Trains the demo's tokenizer: byte-level BPE, 512 entries, in Qwen's manner.

    .venv/bin/python scripts/train_tokenizer.py [--output DIR]

Same input, same files: running it again reproduces titan_vlm/data/demo_tokenizer byte for byte.
"""

import argparse
import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE

from titan_vlm.data.digits import PHRASINGS
from titan_vlm.data.tokenizer import DEMO_TOKENIZER

VOCABULARY = 512
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Words with the sign before them, digits one by one, runs of signs, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- macro visual(name) -%}
    {{- '<|vision_start|><|' ~ name ~ '_pad|><|vision_end|>' -}}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' or part.type == 'image_url' -%}
                {{- visual('image') -}}
            {%- elif part.type == 'video' -%}
                {{- visual('video') -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('unknown content part: ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
ENGLISH = """\
You are a helpful assistant. Describe the image. What is shown in this picture? The photo shows a
woman with a red hat walking along the street in the morning. There are two dogs on the beach, and
the sea is calm. A small white house stands between tall green trees near a lake. The man in the
front of the room is holding a book while the others are listening to him. How many people can you
see here? I can see three children playing with a ball in the garden. What color is the car? The
car is blue, and it is parked next to an old wooden door. On the table there is a glass of water,
some bread, and a bowl of fruit. Which of the two images was taken at night? The second one was.
A close view of a flower with yellow leaves after the rain. The city from above, with its bridges,
towers and roads, under a clear sky. Please answer the question with a single word or number. This
is not a cat but a dog. Yes, that is right. No, it does not look like that at all. The first frame
of the video shows the start of the game; later the player in black runs to the left and throws.
Where does the train go? It goes from the north to the south through the mountains in winter. The
text on the sign says that the shop is open every day of the week. Mountains, rivers, forests and
fields: all these could have been painted by the same hand. Some images are very dark, some are
very bright, and others have noise. When the light comes from behind, faces are hard to make out.
Then another question would be better: what are they doing, and why would they do it together?
"""


def demo_texts() -> list[str]:
    """Every phrasing of the demo as often as makes its words whole, then general English."""
    questions = [
        phrase.format(d=digit) for v in PHRASINGS.values() for phrase in v for digit in "37"
    ]
    roles = ["system", "user", "assistant", "<0.5 seconds>"]
    return (questions + roles) * 4 + ENGLISH.splitlines()


def train() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(demo_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return tokenizer


def write(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 262144,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEMO_TOKENIZER)
    write(parser.parse_args().output)
