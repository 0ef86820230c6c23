"""Files of Hugging Face directories: whole or not there, a tensor at a time, converted."""

import json
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from scripts import convert
from scripts.hf_reference import (
    load_reference,
    new_reference,
    tiny_config,
)
from tests.hf_directory import EXPERTS, assert_same, build, saver, tensors
from titan_vlm.config import config_to_toml, load_config
from titan_vlm.data.tokenizer import load_tokenizer, visual_token_ids
from titan_vlm.errors import ConfigError
from titan_vlm.models import safetensors_io
from titan_vlm.models.qwen3_vl.config import FLAVORS, with_token_ids
from titan_vlm.models.qwen3_vl.hf import (
    load_hf,
    read_config,
)
from titan_vlm.models.safetensors_io import SINGLE, new_directory
from titan_vlm.training.checkpoint import Checkpointer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def save(tmp_path):
    return saver(tmp_path)


# ------------------------------------------------------------------------- complete or not at all


def test_an_interrupted_export_leaves_the_older_one(save, tmp_path):
    model = build(tiny_config(moe=False))
    before = {p.name: p.read_bytes() for p in save(model).iterdir()}

    class Broken(dict):
        def __getitem__(self, name):
            if name == "text.norm.weight":
                raise OSError("no space left on device")
            return super().__getitem__(name)

    with pytest.raises(OSError, match="no space"):
        save(Broken(build(model.config, seed=1).state_dict()), config=model.config)
    assert {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == before

    save(build(model.config, seed=1), max_shard_bytes=100_000)  # replaces it, leaving nothing
    assert not (tmp_path / "saved" / SINGLE).exists()
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_directory_without_a_name_of_its_own_is_refused_or_made(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for path, full in ((".", here), ("/", Path("/"))):
        (here / "notes.txt").touch()
        refused = pytest.raises(ConfigError, match=f"{full} exists and holds no Hugging Face model")
        with refused, new_directory(path):
            pass
    (here / "notes.txt").unlink()
    with new_directory(".") as folder:
        (folder / "config.json").touch()
    assert [p.name for p in here.iterdir()] == ["config.json"]
    assert list(tmp_path.iterdir()) == [here]


def test_an_export_never_replaces_other_files(save, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds no Hugging Face model"):
        save(build(tiny_config(moe=False)))
    assert (tmp_path / "saved" / "thesis.txt").read_text() == "precious"


# -------------------------------------------------------------------------------------- streaming


def test_saving_asks_for_one_tensor_of_a_file_at_a_time(save):
    class Lazy(Mapping):
        """Makes every tensor when asked; counts how many are alive."""

        def __init__(self, state):
            self.state, self.alive, self.most = state, weakref.WeakSet(), 0

        def __getitem__(self, name):
            tensor = self.state[name].clone()
            self.alive.add(tensor)
            self.most = max(self.most, len(self.alive))
            return tensor

        def __iter__(self):
            return iter(self.state)

        def __len__(self):
            return len(self.state)

    model = build(tiny_config(moe=True))
    lazy = Lazy(model.state_dict())
    save(lazy, config=model.config)
    assert lazy.most <= 3  # query, key and value of the vision tower are one tensor there


def test_vision_queries_read_only_their_rows(save, monkeypatch):
    model = build(tiny_config(moe=False))
    directory = save(model)
    read, rows = safetensors_io.TensorInfo.read, []

    def spy(self, part=None):
        if self.name.endswith("0.attn.qkv.weight"):
            rows.append(part)
        return read(self, part)

    monkeypatch.setattr(safetensors_io.TensorInfo, "read", spy)
    load_hf(model, directory)
    assert rows == [slice(0, 32), slice(32, 64), slice(64, 96)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_loading_is_the_model_and_one_tensor(save):
    """In a process of its own: resident memory, mapped pages of the files included."""
    config = tiny_config(
        moe=True, moe_intermediate_size=400, hidden_size=256, intermediate_size=1024, num_layers=10
    )
    directory = save(build(config), max_shard_bytes=200_000_000)
    size = sum(t.nbytes for t in tensors(directory).values())
    largest = max(t.nbytes for t in tensors(directory).values())
    assert size > 80_000_000 > 10 * largest
    code = f"""
        from titan_vlm.models.qwen3_vl.hf import load_hf, read_config
        from titan_vlm.models.qwen3_vl.model import Qwen3VL
        model = Qwen3VL(read_config({str(directory)!r}))
        for parameter in model.parameters():
            parameter.data.fill_(1.0)
        def peak():
            open("/proc/self/clear_refs", "w").write("5")
        def status(key):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key))
        peak()
        before = status("VmRSS")
        load_hf(model, {str(directory)!r})
        print(status("VmHWM") - before)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    grown = int(out.stdout.split()[-1])
    assert grown < 2 * largest + 8_000_000, f"{grown:,} more; the largest tensor is {largest:,}"


# ------------------------------------------------------------------------------ scripts/convert.py


def test_convert_changes_the_layout_and_back_bit_for_bit(tmp_path):
    reference = new_reference(tiny_config(moe=True))
    reference.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    a, b, c = (str(tmp_path / x) for x in "abc")
    assert convert.main([a, b, "--layout", "published"]) == 0
    turned = tensors(tmp_path / "b")[f"{EXPERTS}.gate_up_proj"]
    assert turned.shape == (8, 64, 48)
    assert convert.main([b, c, "--layout", "transformers"]) == 0
    assert_same(tensors(tmp_path / "c"), tensors(tmp_path / "a"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_convert_changes_the_type(save):
    directory = save(build(tiny_config(moe=True)))
    target = directory.with_name("half")
    assert convert.main([str(directory), str(target), "--dtype", "bfloat16"]) == 0
    assert_same(tensors(target), {k: v.to(torch.bfloat16) for k, v in tensors(directory).items()})
    config = json.loads((target / "config.json").read_text())
    parts = (config, config["text_config"], config["vision_config"])
    assert [part["dtype"] for part in parts] == ["bfloat16"] * 3
    assert (target / "chat_template.jinja").exists()


@pytest.fixture
def run_folder(tmp_path):
    """A run's folder with one checkpoint, and the model that is in it."""
    overrides = ["--model.flavor", "debug_moe", "--moe.text.aux_loss", "0"]
    config = load_config("qwen_vlm_moe.toml", overrides)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(config_to_toml(config))
    tokenizer = load_tokenizer()
    model = build(with_token_ids(FLAVORS["debug_moe"], visual_token_ids(tokenizer), len(tokenizer)))
    checkpoints = Checkpointer(tmp_path / "run" / "checkpoints", config.checkpoint)
    checkpoints.save(7, model, torch.optim.AdamW(model.parameters()), {})
    return tmp_path / "run", model


def test_convert_makes_a_directory_from_a_training_checkpoint(run_folder, tmp_path):
    run, model = run_folder
    source, target = run / "checkpoints" / "step-000007", tmp_path / "hf"
    assert convert.main([str(source), str(target), "--dtype", "float32"]) == 0
    assert read_config(target) == model.config
    read = build(model.config, seed=1)
    load_hf(read, target)
    assert_same(read.state_dict(), model.state_dict())
    assert (target / "preprocessor_config.json").exists()
    load_reference(target, torch.float32)


def test_convert_refuses_a_checkpoint_of_another_model(run_folder, tmp_path, capsys):
    run, _ = run_folder
    words = [str(run / "checkpoints" / "step-000007"), str(tmp_path / "hf")]
    toml = run / "config.toml"
    toml.write_text(toml.read_text().replace("debug_moe", "debug"))
    assert convert.main(words) == 2
    assert "is a checkpoint of another model" in capsys.readouterr().err
    toml.unlink()
    assert convert.main(words) == 2
    assert f"{toml} is missing; --config" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_convert_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, message in (
        (["empty", "x"], "neither a Hugging Face directory"),
        (["empty", "empty"], "SOURCE and TARGET are both"),
    ):
        assert convert.main([str(tmp_path / word) for word in words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert.main(["a", "b", "--layout", "square"])
