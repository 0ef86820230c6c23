"""Where samples come from. Every source is a map: `len(source)`, and `source[i]` for any i >= 0,
where i % len is the sample and i // len the epoch (only sources that augment look at it).

    digits      the embedded demo                                      data/digits.py
    llava       JSONL, `conversations` + `image`                       jsonl.py
    openai      JSONL, `messages` with parts                           jsonl.py
    webdataset  tar shards of pictures with captions                   webdataset.py
    hf          a Hugging Face dataset, from disk or hub               hf.py

A sample that cannot be used raises DataError when it is read, naming its file and line.
"""

import re
from dataclasses import replace

from titan_vlm.config import Config
from titan_vlm.data.config import Data
from titan_vlm.data.digits import DigitsSource
from titan_vlm.data.limits import limits
from titan_vlm.data.sources.hf import HfSource
from titan_vlm.data.sources.jsonl import JsonlSource
from titan_vlm.data.sources.webdataset import WebDatasetSource
from titan_vlm.errors import ConfigError

BUILDERS = {
    "digits": lambda data, path, split, seed: DigitsSource(split, seed, kinds=data.kinds),
    "llava": lambda data, path, split, seed: JsonlSource(
        path, "llava", data.image_root, limits(data)
    ),
    "openai": lambda data, path, split, seed: JsonlSource(
        path, "openai", data.image_root, limits(data)
    ),
    "webdataset": lambda data, path, split, seed: WebDatasetSource(
        path, data.caption_prompt, limits(data)
    ),
    "hf": lambda data, path, split, seed: HfSource(data, path, split),
}


def build_source(data: Data, split: str, seed: int, path: str = ""):
    """The source that `[data]` names; `path` replaces data.path (validation data elsewhere)."""
    return BUILDERS[data.source](data, path or data.path, split, seed)


def build_held_out(config: Config):
    """The source of `[eval]`.

    Raises:
        ConfigError: in the names of `[eval]`; a source knows those of `[data]` alone.
    """
    try:
        data = replace(config.data, kinds=[])  # of all, whatever is trained on
        return build_source(data, config.eval.split, config.run.seed, config.eval.path)
    except ConfigError as error:
        raise ConfigError(re.sub(r"^data\.(path|split)\b", r"eval.\1", str(error))) from error
