"""The configuration of a run: one frozen dataclass per TOML section, each field documented in it.

    train_configs/qwen_vlm_moe.toml          [training]            Config.training.steps
                                             steps = 1500    ->
    --training.steps 20 (the command line)                         20, wins over the file

`load_config` reads a file and overrides, `config_to_toml` writes the resolved whole back, exactly.
`python -m titan_vlm.config --config X` checks a config and says nothing when it is good; with
`--print-config` it prints the resolved TOML, with `--help` every setting. Nothing here imports
torch, so a mistake is reported at once and before any process is launched.
"""

import os
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tomli_w

from titan_vlm.conflicts import conflicts
from titan_vlm.data.config import Data
from titan_vlm.errors import ConfigError
from titan_vlm.models.moe.config import MoE
from titan_vlm.models.projector import Projector
from titan_vlm.settings import as_table, build, help_lines, override, pairs, setting
from titan_vlm.training.curriculum import Curriculum, curriculum_conflicts, stage_configs

CONFIG_DIR = Path(__file__).resolve().parents[1] / "train_configs"
# The time tomllib takes grows with the square of a key's parts: both are far beyond any config.
MAX_BYTES = 2**16
MAX_DOTS = 500  # in a line


@dataclass(frozen=True)
class Run:
    output_dir: str = setting(
        "", "Where the run lives; the same command resumes from it. Empty: runs/<config file stem>."
    )
    seed: int = setting(
        0,
        "Seed of the initial weights, the data order and all noise.",
        at_least=0,
        at_most=2**32 - 1,
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Device to train on; auto takes CUDA where it is present."
    )


@dataclass(frozen=True)
class Model:
    name: str = setting("qwen3_vl", "Architecture: a name in titan_vlm/models/registry.py.")
    flavor: str = setting(
        "debug_moe",
        "Named dimensions of the architecture; hf takes them from model.hf_path, parts (omni) from "
        "model.vision_path and model.text_path.",
    )
    hf_path: str = setting(
        "", "Hugging Face directory whose config.json gives the dimensions (flavor hf only)."
    )
    vision_path: str = setting(
        "",
        "Hugging Face directory of a SigLIP or SigLIP2 model, whose vision tower a new model gets: "
        "dimensions and weights (flavor parts only).",
    )
    text_path: str = setting(
        "",
        "Hugging Face directory of a dense Qwen3, which becomes a new model's decoder (flavor "
        "parts only); moe.text.upcycle_shards makes experts of it.",
    )


@dataclass(frozen=True)
class Training:
    steps: int = setting(1000, "Optimizer steps of the whole run.", at_least=1)
    seq_len: int = setting(2048, "Tokens per packed row.", at_least=1)
    global_batch_size: int = setting(8, "Packed rows per optimizer step, of all ranks.", at_least=1)
    micro_batch_size: int = setting(
        1, "Packed rows per forward pass on one rank; the rest is accumulated.", at_least=1
    )
    dtype: Literal["float32", "bfloat16", "float64"] = setting(
        "bfloat16", "Compute type; bfloat16 keeps float32 master weights and reductions."
    )
    max_norm: float = setting(1.0, "Clip the gradient norm to this; 0 never clips.", at_least=0)
    freeze: list[str] = setting(
        [], "Branches (vision, projector, text) or parameter-name patterns that do not train."
    )
    attention_dropout: float = setting(
        0.0,
        "Part of the decoder's attention weights that is left out in training. In plain products, "
        "slow and large for long documents: not for bfloat16 on CUDA.",
        at_least=0,
        below=1,
    )
    max_hours: float = setting(
        0.0,
        "Hours after which the run saves and exits with status 75: the same command goes on. Leave "
        "room for a step and the save; 0: no limit.",
        at_least=0,
    )
    loss_chunk_tokens: int = setting(
        512, "Tokens whose logits exist at a time in the loss; bounds its memory.", at_least=1
    )


@dataclass(frozen=True)
class Optimizer:
    lr: float = setting(1e-4, "Peak learning rate.", at_least=0)
    betas: list[float] = setting(
        [0.9, 0.95], "AdamW moment decay rates.", at_least=0, below=1, length=2
    )
    eps: float = setting(1e-8, "AdamW denominator offset.", above=0)
    weight_decay: float = setting(
        0.1, "Decoupled weight decay of matrices; norms and biases have none.", at_least=0
    )
    branch_lr: dict[str, float] = setting(
        {},
        "Peak learning rate by branch or parameter-name pattern, e.g. { vision = 1e-5 }; "
        "the others use lr.",
        at_least=0,
    )


@dataclass(frozen=True)
class Schedule:
    kind: Literal["constant", "linear", "cosine", "wsd"] = setting(
        "cosine",
        "Course of the learning rate after warm-up; wsd stays at the peak, then decays linearly.",
    )
    warmup_steps: int = setting(0, "Steps of linear warm-up from 0 to the peak.", at_least=0)
    decay_steps: int = setting(0, "Steps of the final decay (wsd only).", at_least=0)
    min_lr_ratio: float = setting(
        0.1, "Learning rate at the end, as a fraction of the peak.", at_least=0, at_most=1
    )


@dataclass(frozen=True)
class Parallelism:
    pp: int = setting(1, "Ranks that the layers are split over, in pipeline stages.", at_least=1)
    pp_schedule: str = setting(
        "1F1B",
        "With pp: GPipe, 1F1B, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble, DualPipeV, "
        "or a .csv file with a row of actions (2F0, 2B0, 2I0, 2W0) for each rank.",
    )
    pp_microbatches: int = setting(
        0,
        "With pp: micro-batches in flight in one run of the schedule; 0: all of a step. The others "
        "are accumulated in further runs.",
        at_least=0,
    )
    pp_stages_per_rank: int = setting(
        0,
        "With pp: stages on each rank; 0: as the schedule has it (1, interleaved 2).",
        at_least=0,
    )
    pp_split: list[str] = setting(
        [],
        "With pp: the first module of every stage but the first, such as text.layers.3 or lm_head. "
        "Empty: stages of equal cost.",
    )
    dp_replicate: int = setting(1, "Replicas of each shard of the model (HSDP).", at_least=1)
    dp_shard: int = setting(
        -1, "Ranks a parameter is sharded over (FSDP2), times ep; -1: what remains.", at_least=-1
    )
    ep: int = setting(
        1, "Ranks the experts are spread over; for the other layers more dp_shard.", at_least=1
    )
    tp: int = setting(1, "Ranks a matrix product is split over.", at_least=1)
    expert_parallel_over_tp: bool = setting(
        False, "Spread the experts over ep x tp instead of ep alone."
    )
    expert_placement: Literal["linear", "round_robin", "balanced"] = setting(
        "linear",
        "Which rank has which expert: neighbours together, in turn, or so that measured loads are "
        "even, every eplb_interval steps.",
    )
    eplb_interval: int = setting(
        0,
        "With expert_placement balanced: steps after which experts, with their optimizer state, "
        "move to other ranks if that evens the load.",
        at_least=0,
    )
    sequence_parallel: bool = setting(
        True, "With tp: between the products each rank holds its part of the sequence only."
    )
    reshard_after_forward: Literal["auto", "always", "never"] = setting(
        "auto",
        "Whether a block's gathered parameters are given up between its forward and its backward "
        "pass; auto: not with pp, whose micro-batches would gather them again and again.",
    )
    async_tp: bool = setting(
        False,
        "With tp and sequence_parallel: overlap each exchange with its product, over symmetric "
        "memory (on a CPU the same numbers without overlap).",
    )
    cpu_offload: bool = setting(
        False,
        "Keep parameters, gradients and optimizer state in host memory and update them there; a "
        "block is on the GPU while it runs.",
    )


@dataclass(frozen=True)
class Comm:
    timeout_s: float = setting(
        600.0,
        "Seconds that a collective waits for a rank, before the run ends and names it.",
        at_least=1,
        at_most=604800,
    )


@dataclass(frozen=True)
class ActivationCheckpoint:
    mode: Literal["none", "full", "selective", "layers"] = setting(
        "none",
        "What the backward pass recomputes: nothing, every block, cheap operators only, or every "
        "n-th block.",
    )
    every: int = setting(2, "The n of mode layers.", at_least=1)


@dataclass(frozen=True)
class Compile:
    enable: bool = setting(False, "Compile every block with torch.compile.")
    backend: str = setting("inductor", "Backend of torch.compile.")


@dataclass(frozen=True)
class Quantize:
    experts: Literal["none", "float8", "mxfp8"] = setting(
        "none",
        "Round the operands of the experts' products: float8 with a scale per row (H100, B200), "
        "mxfp8 with one per 32 numbers (B200); by torchao, in bfloat16 runs.",
    )
    emulate: bool = setting(
        False,
        "Round in plain PyTorch and multiply as before: the same numbers on any device, slowly.",
    )


@dataclass(frozen=True)
class Checkpoint:
    every: int = setting(0, "Save every n steps; 0 saves at the end only.", at_least=0)
    async_save: bool = setting(False, "Write checkpoints while training goes on.")
    keep_latest_k: int = setting(2, "Checkpoints kept; 0 keeps all.", at_least=0)
    keep_every: int = setting(
        0, "Keep the checkpoints of every n-th step besides; 0: none.", at_least=0
    )
    directory: str = setting(
        "",
        "Where checkpoints lie, also s3://, gs:// and what fsspec knows. Empty: in output_dir.",
    )
    resume: str = setting(
        "auto",
        "auto: continue from the newest whole checkpoint; none: refuse to start where there is "
        "one; or the step to go back to, once.",
    )
    initial_load_path: str = setting(
        "", "Hugging Face directory to start from; a checkpoint in output_dir goes before it."
    )
    export_hf: bool = setting(False, "Write a Hugging Face directory at the end of training.")
    export_dtype: Literal["float32", "bfloat16", "float64"] = setting(
        "bfloat16", "Type of the exported tensors."
    )
    export_layout: Literal["auto", "published", "transformers"] = setting(
        "auto",
        "Layout of exported expert tensors: published [E, D, 2F] and [E, F, D], as the released "
        "checkpoints and vLLM have it; transformers [E, 2F, D] and [E, D, F]; auto is published "
        "unless transformers would misread it because a tensor is square.",
    )


@dataclass(frozen=True)
class Guards:
    max_failed_saves: int = setting(
        3, "Saves that may fail one after the other before the run stops.", at_least=1
    )
    max_skips: int = setting(
        5,
        "Steps in a row that may be skipped because loss, gradients or router logits are not "
        "finite, before the run goes back to its last checkpoint and passes over their rows, once; "
        "0: the first such step ends the run.",
        at_least=0,
    )
    spike_zscore: float = setting(
        0.0,
        "A loss or gradient norm is a spike when it is so many robust standard deviations above "
        "the median of the last spike_window updates; 0: nothing is.",
        at_least=0,
    )
    spike_window: int = setting(100, "Updates that a spike is compared with.", at_least=20)
    on_spike: Literal["warn", "skip"] = setting(
        "warn", "What to do at a spike: say so, or skip the step as one that is not finite."
    )


@dataclass(frozen=True)
class Metrics:
    log_every: int = setting(10, "Steps between lines of metrics.", at_least=1)
    tensorboard: bool = setting(True, "Also write TensorBoard events to output_dir.")
    peak_tflops: float = setting(
        0.0,
        "Peak TFLOP/s of one device, for MFU; 0 looks it up by name and leaves MFU out if unknown.",
        at_least=0,
    )


@dataclass(frozen=True)
class Eval:
    every: int = setting(
        0, "Validate every n steps; 0: at the end only, where there is held-out data.", at_least=0
    )
    split: str = setting(
        "validation", "Split to validate on (sources digits, and hf where it has this split)."
    )
    path: str = setting("", "Held-out data in the format of data.source. Empty: data.path.")
    samples: int = setting(200, "Samples to validate on.", at_least=1)
    max_new_tokens: int = setting(16, "Longest answer that is decoded.", at_least=1)
    show: int = setting(4, "Questions and answers printed at each validation.", at_least=0)


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    parallelism: Parallelism = field(default_factory=Parallelism)
    comm: Comm = field(default_factory=Comm)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    projector: Projector = field(default_factory=Projector)
    moe: MoE = field(default_factory=MoE)
    quantize: Quantize = field(default_factory=Quantize)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    guards: Guards = field(default_factory=Guards)
    metrics: Metrics = field(default_factory=Metrics)
    eval: Eval = field(default_factory=Eval)
    curriculum: Curriculum = field(default_factory=Curriculum)


def validate(config: Config, where: str = "config") -> None:
    """Refuse settings that are each fine but do not go together; `where` opens the message."""
    found = curriculum_conflicts(config) if config.curriculum.stages else conflicts(config)
    for conflict in found:
        raise ConfigError(f"{where}: {conflict}")
    try:
        stage_configs(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def load_config(path_or_name: str, overrides: Sequence[str] = ()) -> Config:
    """A validated Config from a TOML file, a path or a name in train_configs/, and command-line
    words: `load_config("qwen_vlm_moe.toml", ["--training.steps", "20", "--run.seed=1"])`."""
    return _load(path_or_name, list(pairs(overrides)))


def _load(path_or_name: str, overrides: list[tuple[str, str]]) -> Config:
    path = _find(path_or_name)
    config = build(Config, _read_toml(path), str(path))
    for key, text in overrides:
        config = override(config, key, text, "command line")
    if not config.run.output_dir:
        config = replace(config, run=replace(config.run, output_dir=f"runs/{path.stem}"))
    validate(config, f"{path} + command line" if overrides else str(path))
    return config


def _find(path_or_name: str) -> Path:
    given = Path(path_or_name)
    here = Path.cwd()
    for path in (given, CONFIG_DIR / given, CONFIG_DIR / f"{given}.toml"):
        if os.path.isfile(path):
            return path.relative_to(here) if path.is_relative_to(here) else path
    found = "is a directory" if os.path.isdir(given) else "no such file"
    raise ConfigError(f"{given}: {found}; expected {_choices()}")


def _choices() -> str:
    names = sorted(path.name for path in CONFIG_DIR.glob("*.toml"))
    return f"a path or a name in train_configs/: {', '.join(names)}"


def _read_toml(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path}: expected at most {MAX_BYTES} bytes of settings, got more")
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, got byte {error.start}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > MAX_DOTS:
            raise ConfigError(f"{path}:{number}: expected at most {MAX_DOTS} dots in a line")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid TOML: values nested too deeply") from error
    except ValueError as error:
        line = re.search(r"at line (\d+)", str(error))
        number = line[1] if line else len(text.splitlines())
        raise ConfigError(f"{path}:{number}: not valid TOML: {error}") from error


def config_to_toml(config: Config) -> str:
    """TOML that loads back to an equal Config."""
    return tomli_w.dumps(as_table(config))


def print_help() -> None:
    print(
        "usage: ./run_train.sh --config FILE [--section.key value ...] [--print-config]\n\n"
        "FILE is a path or a name in train_configs/. Every setting below can stand in FILE under\n"
        'its [section] or on the command line, which wins. Lists: a,b or \'["a", "b"]\'; tables:\n'
        "'{ vision = 1e-5 }'. --print-config prints the resolved TOML and trains nothing."
    )
    print("\n".join(help_lines(Config)))


def config_from_args(argv: Sequence[str]) -> Config:
    """The Config that a command line asks for; `--help` and `--print-config` print and exit."""
    if "--help" in argv or "-h" in argv:
        print_help()
        raise SystemExit(0)
    given = list(pairs([word for word in argv if word != "--print-config"]))
    files = [value for key, value in given if key == "config"]
    if not files:
        raise ConfigError(f"command line: expected --config FILE, {_choices()}")
    config = _load(files[-1], [pair for pair in given if pair[0] != "config"])
    if "--print-config" in argv:
        print(config_to_toml(config), end="")
        raise SystemExit(0)
    return config


def main(argv: Sequence[str]) -> int:
    try:
        config_from_args(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
