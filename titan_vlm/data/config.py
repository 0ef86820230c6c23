"""The section [data]: where samples come from, and how they become rows."""

from dataclasses import dataclass
from typing import Literal

from titan_vlm.settings import setting


@dataclass(frozen=True)
class Samples:
    """One source of samples."""

    source: Literal["digits", "llava", "openai", "webdataset", "hf"] = setting(
        "digits",
        "Where samples come from: digits (embedded demo), llava or openai (JSONL), webdataset (tar "
        "shards), hf (Hugging Face datasets).",
    )
    path: str = setting(
        "",
        "File, directory or glob of the source; for hf a save_to_disk directory or a hub name. "
        "digits takes none.",
    )
    split: str = setting("train", "Split to train on (sources digits and hf; others have none).")
    kinds: list[Literal["which", "sum", "row", "larger", "count", "between", "words"]] = setting(
        [], "Questions of the source digits, in turn (data/digits.py). Empty: all with pictures."
    )
    image_root: str = setting(
        "", "Directory that relative image paths start from. Empty: the directory of the data file."
    )
    image_column: str = setting("image", "Column with the image or list of images (source hf).")
    text_column: str = setting("text", "Column with the caption (source hf without messages).")
    messages_column: str = setting(
        "",
        "Column with messages in OpenAI form (source hf). Empty: caption_prompt is asked and "
        "text_column answers.",
    )
    caption_prompt: str = setting(
        "Describe the image.", "The user's words where a sample is an image and a caption."
    )


@dataclass(frozen=True)
class Source(Samples):
    """One of several sources that are mixed."""

    name: str = setting("", "What metrics, logs and the ledger call the source.")
    off: bool = setting(False, "Leave it out, in a stage of a curriculum for instance.")
    weight: float = setting(
        0.0,
        "Its share of the mixture, relative to the others'. With a weight on none, the number of "
        "samples decides (data.mixture_temperature).",
        at_least=0,
    )
    epochs: int = setting(
        0,
        "Times that the source is read before the others go on without it; 0: for ever.",
        at_least=0,
    )
    limit: int = setting(
        0,
        "Samples that are read of it, in all epochs, before the others go on without it; 0: no "
        "limit.",
        at_least=0,
    )


@dataclass(frozen=True)
class Data(Samples):
    sources: list[Source] = setting(
        [],
        "Sources to mix, each a table [[data.sources]] with keys of its own; data.source and its "
        "keys then say how the held-out data of eval.path are read.",
    )
    mixture_by: Literal["samples", "tokens"] = setting(
        "samples", "With data.sources: what their weights are shares of."
    )
    mixture_temperature: float = setting(
        1.0,
        "With data.sources that have no weights: their shares go as samples ^ (1 / this); 1 takes "
        "them as large as they are, more evens them out.",
        at_least=0.1,
    )
    ledger: bool = setting(
        False, "Write the ids of the samples of every step into output_dir/ledger."
    )
    tokenizer: str = setting(
        "", "Hugging Face tokenizer directory with a chat template. Empty: the demo tokenizer."
    )
    virtual_shards: int = setting(
        16,
        "Shards the samples are dealt to, each packing its own rows; fixes the sequence of rows of "
        "the run, whatever the number of processes and workers.",
        at_least=1,
    )
    pack_window: int = setting(
        16, "Samples a virtual shard holds ready, to fit them into rows first-fit.", at_least=1
    )
    overlong: Literal["drop", "cut"] = setting(
        "drop", "What happens to a sample longer than training.seq_len; either way it is counted."
    )
    min_pixels: int = setting(65536, "Smaller images are enlarged to this many pixels.", at_least=1)
    max_pixels: int = setting(16777216, "Larger images are shrunk to this many pixels.", at_least=1)
    video_min_pixels: int = setting(
        4096, "As min_pixels, for a whole video: frames x height x width.", at_least=1
    )
    video_max_pixels: int = setting(
        25165824, "As max_pixels, for a whole video: frames x height x width.", at_least=1
    )
    video_fps: float = setting(2.0, "Frames per second sampled from a video.", above=0)
    max_image_pixels: int = setting(
        89_478_485,
        "Pictures and video frames of more pixels are not decoded; the sample is skipped.",
        at_least=1,
        at_most=178_956_970,  # where Pillow itself refuses
    )
    max_sample_bytes: int = setting(
        2**26,
        "Longer JSONL lines, picture files, members of shards and answers of servers are not read; "
        "the sample is skipped.",
        at_least=1,
    )
    max_sample_chars: int = setting(
        1_000_000, "Samples with more characters of text are skipped.", at_least=1
    )
    max_sample_parts: int = setting(
        1000, "Samples with more turns, texts, pictures and frames are skipped.", at_least=1
    )
    allow_outside: bool = setting(
        False, "Read pictures and videos outside of data.image_root, too, when a sample names them."
    )
    allow_remote: bool = setting(
        False, "Fetch pictures that samples name by http(s) URL; private addresses never."
    )
    remote_timeout_s: float = setting(
        10.0, "With allow_remote: seconds until a picture must be there.", above=0, at_most=3600
    )
    feature_cache: str = setting(
        "",
        "Directory where a frozen vision tower's features of each picture are kept, for this and "
        "other runs with the same tower (omni only); empty: none.",
    )
    num_workers: int = setting(
        0, "Loader processes per rank; 0 prepares samples in the training process.", at_least=0
    )
    max_bad_fraction: float = setting(
        0.01,
        "Samples that cannot be used are skipped and logged; a larger fraction ends the run.",
        at_least=0,
        at_most=1,
    )
