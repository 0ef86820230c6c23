"""The configuration: what is read, what is refused, and in which words."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path

import pytest

from titan_vlm.config import (
    CONFIG_DIR,
    Config,
    config_from_args,
    config_to_toml,
    load_config,
    main,
    print_help,
    validate,
)
from titan_vlm.errors import ConfigError, DataError
from titan_vlm.settings import leaves
from titan_vlm.training.curriculum import stage_configs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def toml(tmp_path):
    """Writes a config file and returns its path."""

    def write(text: str, name: str = "my_run.toml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(*args) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_file_wins_over_default_and_command_line_wins_over_file(toml):
    path = toml("[training]\nsteps = 7\nseq_len = 64\n")
    config = load_config(path, ["--training.seq_len", "128", "--run.seed=3"])
    assert (config.training.steps, config.training.seq_len, config.run.seed) == (7, 128, 3)
    assert config.training.global_batch_size == Config().training.global_batch_size


def test_config_is_frozen(toml):
    with pytest.raises(FrozenInstanceError):
        load_config(toml("")).training.steps = 3


def test_output_dir_defaults_to_the_stem_of_the_file(toml):
    assert load_config(toml("", "night.v2.toml")).run.output_dir == "runs/night.v2"
    assert load_config(toml(""), ["--run.output_dir", "x"]).run.output_dir == "x"


@pytest.mark.parametrize("name", ["qwen_vlm_moe.toml", "qwen_vlm_moe"])
def test_a_name_in_train_configs_is_found_from_any_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).run.output_dir == "runs/qwen_vlm_moe"


def test_a_path_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("qwen_vlm_moe.toml").write_text("[run]\nseed = 77\n")
    assert load_config("qwen_vlm_moe.toml").run.seed == 77


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_round_trips(path, toml):
    config = load_config(str(path), path_where_needed(path))
    assert load_config(toml(config_to_toml(config))) == config


def path_where_needed(path):
    text = path.read_text()
    named = 'source = "digits"' in text or "[[data.sources]]" in text
    return [] if named else ["--data.path", "somewhere"]


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_config_keeps_its_experts_evenly_loaded(path):
    config = load_config(str(path), path_where_needed(path))
    with_experts = config.model.flavor in ("debug_moe", "30b-a3b") or config.moe.text.experts > 0
    assert with_experts
    for _, _, stage in stage_configs(config):
        assert stage.moe.text.losses or stage.moe.text.has_bias


def test_toml_round_trip_is_exact_for_awkward_values(toml):
    words = [
        "--optimizer.lr",
        "1.2345678901234567e-17",
        "--optimizer.betas",
        "0.1,0.30000000000000004",
    ]
    words += [
        "--training.freeze",
        '["text.layers.*", "a\\"b\\\\c"]',
        "--run.output_dir",
        'ü "q" \\ \t',
    ]
    words += ["--optimizer.branch_lr", '{"text.layers.*" = 1e22, vision = 3}']
    config = load_config(toml(""), words)
    assert config.training.freeze == ["text.layers.*", 'a"b\\c']
    assert config.optimizer.branch_lr == {"text.layers.*": 1e22, "vision": 3.0}
    assert load_config(toml(config_to_toml(config))) == config


def test_every_setting_is_printed_and_documented(capsys):
    print_help()
    text = capsys.readouterr().out
    for key, f in leaves(Config):
        assert f"  --{key}  (" in text
        assert len(f.metadata["text"]) > 10
    assert "--training.steps  (int >= 1, default 1000)\n      Optimizer steps" in text
    assert "--run.seed  (int >= 0 and <= 4294967295, default 0)" in text
    assert "--optimizer.betas  (list of 2 x finite float >= 0 and < 1, default [0.9, 0.95])" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_sections_hold_leaves_only_but_for_the_branches_of_moe():
    for section in fields(Config):
        assert is_dataclass(section.type)
        nested = [f.name for f in fields(section.type) if is_dataclass(f.type)]
        assert nested == (["text", "vision", "projector"] if section.name == "moe" else [])


def test_defaults_pass_their_own_checks(toml):
    validate(Config())
    default = load_config(toml("", "my_run.toml"))
    rebuilt = load_config(toml(config_to_toml(default), "other.toml"))
    assert rebuilt == default


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("--training.steps=12", 12),
        ("--optimizer.lr=3", 3.0),
        ("--optimizer.lr=2e-3", 2e-3),
        ("--compile.enable=true", True),
        ("--metrics.tensorboard=false", False),
        ("--training.freeze=vision", ["vision"]),
        ("--training.freeze=vision, text.layers.*", ["vision", "text.layers.*"]),
        ('--training.freeze=["a,b"]', ["a,b"]),
        ("--training.freeze=", []),
        ("--training.freeze=vision,", ["vision"]),
        ("--training.freeze= , vision ,,text", ["vision", "text"]),
        ("--optimizer.betas=0.8,0.9", [0.8, 0.9]),
        ("--optimizer.betas=[0, 0.9]", [0.0, 0.9]),
        ("--optimizer.branch_lr={vision=1e-4}", {"vision": 1e-4}),
        ("--optimizer.branch_lr={}", {}),
        ("--schedule.kind=linear", "linear"),
        ("--data.caption_prompt=What = this, please?", "What = this, please?"),
        ("--data.image_root=", ""),
        ("--eval.split=true", "true"),
        ("--data.tokenizer=7", "7"),
    ],
)
def test_an_override_is_typed_by_its_field(word, value, toml):
    config = load_config(toml(""), [word])
    section, name = word.removeprefix("--").partition("=")[0].split(".")
    got = getattr(getattr(config, section), name)
    assert got == value
    assert type(got) is type(value)
    if isinstance(value, (list, dict)):
        kinds = [type(item) for item in (got.values() if isinstance(got, dict) else got)]
        assert kinds == [type(i) for i in (value.values() if isinstance(value, dict) else value)]


def test_the_last_of_two_overrides_wins(toml):
    words = ["--training.steps", "3", "--training.steps=5"]
    assert load_config(toml(""), words).training.steps == 5


def test_a_negative_number_is_a_value_not_a_flag(toml):
    message = refusal(toml(""), ["--training.steps", "-3"])
    assert message == "command line: training.steps: expected int >= 1, got -3"


BAD_VALUES = [
    ("training", "steps = 0", "training.steps: expected int >= 1, got 0"),
    ("training", "steps = 1.0", "training.steps: expected int >= 1, got 1.0"),
    ("training", "steps = true", "training.steps: expected int >= 1, got true"),
    ("training", 'steps = "5"', 'training.steps: expected int >= 1, got "5"'),
    ("training", "steps = [5]", "training.steps: expected int >= 1, got [5]"),
    ("training", "steps = {a = 1}", 'training.steps: expected int >= 1, got {"a": 1}'),
    ("training", "steps = 2026-01-01", 'training.steps: expected int >= 1, got "2026-01-01"'),
    ("run", "seed = 4294967296", "run.seed: expected int >= 0 and <= 4294967295, got 4294967296"),
    ("optimizer", "lr = nan", "optimizer.lr: expected finite float >= 0, got NaN"),
    ("optimizer", "lr = inf", "optimizer.lr: expected finite float >= 0, got Infinity"),
    ("optimizer", "lr = -1e-3", "optimizer.lr: expected finite float >= 0, got -0.001"),
    ("optimizer", "lr = false", "optimizer.lr: expected finite float >= 0, got false"),
    ("optimizer", "eps = 0", "optimizer.eps: expected finite float > 0, got 0"),
    (
        "optimizer",
        "betas = [0.9]",
        "optimizer.betas: expected list of 2 x finite float >= 0 and < 1, got [0.9]",
    ),
    (
        "optimizer",
        "betas = [0.9, 1.0]",
        "optimizer.betas: expected list of 2 x finite float >= 0 and < 1, got [0.9, 1.0]",
    ),
    (
        "optimizer",
        "branch_lr = {vision = true}",
        'optimizer.branch_lr: expected table of name = finite float >= 0, got {"vision": true}',
    ),
    (
        "optimizer",
        "branch_lr.text.layers = 1.0",
        "optimizer.branch_lr: expected table of name = finite float >= 0, "
        'got {"text": {"layers": 1.0}}',
    ),
    ("compile", "enable = 1", "compile.enable: expected true|false, got 1"),
    ("compile", 'enable = "true"', 'compile.enable: expected true|false, got "true"'),
    ("training", "freeze = 'vision'", 'training.freeze: expected list of string, got "vision"'),
    ("training", "freeze = ['a', 1]", 'training.freeze: expected list of string, got ["a", 1]'),
    ("data", "path = 3", "data.path: expected string, got 3"),
    (
        "schedule",
        'kind = "cosin"',
        'schedule.kind: expected constant|linear|cosine|wsd, got "cosin"',
    ),
    (
        "data",
        "max_bad_fraction = 1.5",
        "data.max_bad_fraction: expected finite float >= 0 and <= 1, got 1.5",
    ),
]


@pytest.mark.parametrize(("section", "line", "expected"), BAD_VALUES)
def test_a_bad_value_in_a_file_names_file_key_expectation_and_value(section, line, expected, toml):
    path = toml(f"[{section}]\n{line}\n")
    assert refusal(path) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--training.steps=many", 'training.steps: expected int >= 1, got "many"'),
        ("--training.steps=1e3", 'training.steps: expected int >= 1, got "1e3"'),
        ("--training.steps=", 'training.steps: expected int >= 1, got ""'),
        ("--compile.enable=True", 'compile.enable: expected true|false, got "True"'),
        ("--optimizer.lr=nan", "optimizer.lr: expected finite float >= 0, got NaN"),
        ("--optimizer.lr=1e999", "optimizer.lr: expected finite float >= 0, got Infinity"),
        (
            "--optimizer.betas=0.9,x",
            'optimizer.betas: expected list of 2 x finite float >= 0 and < 1, got [0.9, "x"]',
        ),
        (
            "--optimizer.branch_lr=vision=1e-4",
            'optimizer.branch_lr: expected table of name = finite float >= 0, got "vision=1e-4"',
        ),
        (
            "--optimizer.branch_lr={}\nother = 1",
            'optimizer.branch_lr: expected table of name = finite float >= 0, got "{}\\nother = 1"',
        ),
        ("--training.freeze=[1]", "training.freeze: expected list of string, got [1]"),
        ("--training.dtype=fp16", 'expected float32|bfloat16|float64, got "fp16"'),
    ],
)
def test_a_bad_override_names_the_command_line(word, expected, toml):
    message = refusal(toml(""), [word])
    assert message.startswith("command line: ")
    assert message.endswith(expected)


def test_an_integer_beyond_floats_is_refused(toml):
    path = toml(f"[optimizer]\nlr = 1{'0' * 400}\n")
    message = refusal(path)
    assert message.startswith(f"{path}: optimizer.lr: expected finite float >= 0, got 1000")
    assert message.endswith("...")


HUGE = f"0x{'f' * 5000}"  # more digits than Python writes in decimal


@pytest.mark.parametrize("key", ["run.seed", "training.steps", "optimizer.lr", "data.path"])
def test_an_integer_of_thousands_of_digits_is_refused(key, toml):
    section, name = key.split(".")
    path = toml(f"[{section}]\n{name} = {HUGE}\n")
    message = refusal(path)
    assert message.startswith(f"{path}: {key}: expected ")
    assert message.endswith(", got a value too large to show")


def test_an_integer_beyond_those_of_toml_is_refused(toml):
    assert load_config(toml(f"[training]\nsteps = {2**63 - 1}")).training.steps == 2**63 - 1
    assert refusal(toml(f"[training]\nsteps = {2**63}")).endswith(f"got {2**63}")


def test_values_nested_without_end_are_refused(toml):
    deep = "[" * 5000 + "]" * 5000
    path = toml(f"[run]\nseed = {deep}")
    assert refusal(path) == f"{path}: not valid TOML: values nested too deeply"
    for key, expected in (("training.freeze", "list of string"), ("optimizer.branch_lr", "table")):
        assert f"{key}: expected {expected}" in refusal(toml(""), [f"--{key}={deep}"])
    path = toml(f"run.seed{'.a' * 5000} = 1")  # no recursion to read, one to show
    assert refusal(path) == f"{path}:1: expected at most 500 dots in a line"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[training]\nstpes = 5", "training.stpes: unknown key; nearest known: training.steps"),
        ("[training]\nlr = 5", "training.lr: unknown key; nearest known: optimizer.lr"),
        ("steps = 5", "steps: unknown key; nearest known: training.steps"),
        ("[trainig]\nsteps = 5", "[trainig]: unknown section; nearest known: [training]"),
        ("[zzz]", "[zzz]: unknown section; nearest known: ["),
        ("training = 5", "training: expected a section [training], got 5"),
        ("[[training]]\nsteps = 5", 'training: expected a section [training], got [{"steps": 5}]'),
        ("[training.sub]\nsteps = 5", "[training.sub]: unknown section; nearest known: [training]"),
        ("[moe.tex]\ntop_k = 5", "[moe.tex]: unknown section; nearest known: [moe.text]"),
        ("[text]\ntop_k = 5", "[text]: unknown section; nearest known: [moe.text]"),
        ("[moe.text.fusd]", "[moe.text.fusd]: unknown section; nearest known: [moe.text.fused]"),
        (
            "[moe.text.anneal.aux_los]\n0 = 1.0",
            "moe.text.anneal.aux_los: unknown key; nearest known: moe.text.anneal.aux_loss",
        ),
        (
            "[optimizer]\nbranch_lrs = { vision = 1e-4 }",
            "optimizer.branch_lrs: unknown key; nearest known: optimizer.branch_lr",
        ),
        ("[moe.text]\nexpert = 5", "moe.text.expert: unknown key; nearest known: moe.text.experts"),
        ('[training]\n"a\\nb" = 5', "training.a b: unknown key; nearest known: training."),
    ],
)
def test_an_unknown_key_or_section_names_the_nearest_known_one(text, expected, toml):
    path = toml(text)
    assert refusal(path).startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--training.stpes", "5"], "training.stpes: unknown key; nearest known: training.steps"),
        (["--trainig.steps", "5"], "trainig.steps: unknown key; nearest known: training.steps"),
        (["--steps", "5"], "steps: unknown key; nearest known: training.steps"),
        (["--training", "5"], "training: unknown key; nearest known: "),
        (
            ["--training.steps.x", "5"],
            "training.steps.x: unknown key; nearest known: training.steps",
        ),
        (
            ["--training.steps"],
            "training.steps: expected a value (--training.steps VALUE), got none",
        ),
        (
            ["--training.steps", "--run.seed", "1"],
            "training.steps: expected a value (--training.steps VALUE), got none",
        ),
        (["steps=5"], "steps=5: expected --config FILE or --section.key value"),
        (["-x"], "-x: expected --config FILE or --section.key value"),
        (["--"], "--: expected --config FILE or --section.key value"),
    ],
)
def test_a_bad_word_on_the_command_line_is_named(words, expected, toml):
    assert refusal(toml(""), words).startswith(f"command line: {expected}")


def test_a_missing_file_lists_the_names_there_are(tmp_path):
    message = refusal("nope.toml")
    assert message.startswith(
        "nope.toml: no such file; expected a path or a name in train_configs/"
    )
    assert "qwen_vlm_moe.toml" in message
    assert refusal(str(tmp_path)).startswith(f"{tmp_path}: is a directory; expected a path")
    assert "no such file" in refusal("x" * 5000)
    assert "no such file" in refusal("a\0b")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[training]\nsteps 5\n", 2),
        ("[training]\nsteps = 5\nsteps = 6\n", 3),
        ("[training]\nsteps = [1,\n", 2),
        (f"[run]\nseed = {'9' * 5000}\n", 2),
    ],
)
def test_a_syntax_error_names_file_and_line(text, line, toml):
    path = toml(text)
    assert refusal(path).startswith(f"{path}:{line}: not valid TOML: ")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"[run]\n\xff\xfe")
    assert refusal(str(path)) == f"{path}: expected UTF-8 text, got byte 6"


LLAVA = "[data]\nsource = 'llava'\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[training]\nglobal_batch_size = 8\nmicro_batch_size = 3",
            "training.global_batch_size: expected a multiple of training.micro_batch_size (3), "
            "got 8; nearest that work: global_batch_size = 6 or 9, or micro_batch_size = 2 or 4",
        ),
        (
            "[training]\nglobal_batch_size = 2\nmicro_batch_size = 3",
            "got 2; nearest that work: global_batch_size = 3, or micro_batch_size = 1 or 2",
        ),
        ("[model]\nflavor = 'hf'", 'got flavor = "hf" and hf_path = ""'),
        ("[model]\nhf_path = 'd'", 'got flavor = "debug_moe" and hf_path = "d"'),
        (LLAVA, 'data.path: expected a file, directory or glob for source = "llava", got ""'),
        ("[data]\npath = 'x'", 'data.path: expected none for source = "digits", got "x"'),
        (
            "[data]\nmin_pixels = 9\nmax_pixels = 8",
            "data.min_pixels: expected at most data.max_pixels (8), got 9",
        ),
        (
            "[data]\nvideo_min_pixels = 9\nvideo_max_pixels = 8",
            "data.video_min_pixels: expected at most data.video_max_pixels (8), got 9",
        ),
        (
            "[training]\nsteps = 5\n[schedule]\nwarmup_steps = 6",
            "schedule.warmup_steps: expected at most training.steps (5), got 6",
        ),
        ("[schedule]\ndecay_steps = 6", 'got 6 with kind = "cosine"'),
        ("[schedule]\nkind = 'wsd'", 'got 0 with kind = "wsd"'),
        (
            "[training]\nsteps = 9\n[schedule]\nkind = 'wsd'\nwarmup_steps = 4\ndecay_steps = 6",
            "schedule.decay_steps: expected at most training.steps - schedule.warmup_steps (5), "
            "got 6",
        ),
        (f"{LLAVA}path = 'x'\n[eval]\nevery = 5", "eval.path: expected held-out data"),
        (f"{LLAVA}path = 'x'\n[eval]\npath = 'x'", 'expected other data than data.path ("x")'),
        (
            "[data]\nsource = 'webdataset'\npath = 'a/x'\n[eval]\npath = './a/../a/x'",
            'eval.path: expected other data than data.path ("a/x")',
        ),
        ("[eval]\npath = 'x'", 'eval.path: expected none for source = "digits", got "x"'),
        ("[eval]\nsplit = 'train'", 'eval.split: expected another split than data.split ("train")'),
        (
            "[data]\nsource = 'hf'\npath = 'x'\n[eval]\nsplit = 'train'\npath = 'x/'",
            'eval.split: expected another split than data.split ("train")',
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(text, expected, toml):
    path = toml(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


@pytest.mark.parametrize(
    "text",
    [
        "[training]\nsteps = 5\n[schedule]\nwarmup_steps = 5",
        "[training]\nsteps = 9\n[schedule]\nkind = 'wsd'\nwarmup_steps = 4\ndecay_steps = 5",
        "[model]\nflavor = 'hf'\nhf_path = 'd'",
        f"{LLAVA}path = 'x'\n[eval]\nevery = 5\npath = 'y'",
        f"{LLAVA}path = 'x'\n[eval]\nsplit = 'train'",
        "[data]\nsource = 'hf'\npath = 'x'\n[eval]\nsplit = 'train'\npath = 'y'",
        "[data]\nsource = 'hf'\npath = 'x'\n[eval]\nsplit = 'test'\npath = 'x'",
        "[data]\nmin_pixels = 8\nmax_pixels = 8",
    ],
)
def test_the_edge_of_what_goes_together_is_accepted(text, toml):
    load_config(toml(text))


def test_a_conflict_that_overrides_took_part_in_says_so(toml):
    path = toml("[schedule]\nwarmup_steps = 100")
    message = refusal(path, ["--training.steps", "5"])
    assert message.startswith(f"{path} + command line: schedule.warmup_steps: expected at most")


def test_config_from_args_needs_a_config_and_takes_both_spellings(toml):
    path = toml("[run]\nseed = 5")
    for words in (
        ["--config", path],
        [f"--config={path}"],
        ["--run.device", "cpu", "--config", path],
    ):
        assert config_from_args(words).run.seed == 5
    with pytest.raises(ConfigError, match=r"^command line: expected --config FILE.*qwen_vlm_moe"):
        config_from_args(["--run.seed", "1"])


def test_print_config_is_the_resolved_toml(toml, capsys):
    path = toml("[run]\nseed = 5")
    with pytest.raises(SystemExit) as caught:
        config_from_args(["--config", path, "--print-config", "--training.steps", "9"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert load_config(toml(printed, "printed.toml")) == load_config(
        path, ["--training.steps", "9"]
    )


def test_main_is_silent_when_good_and_one_line_with_code_2_when_not(toml, capsys):
    assert main(["--config", toml("")]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["--config", toml("[run]\nsed = 1")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_the_config_is_checked_without_importing_torch():
    code = "import sys, titan_vlm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_user_errors_stay_one_line(kind):
    assert str(kind("a\nb\r\nc")) == "a b c"
    assert isinstance(kind("a"), ValueError)
