"""[[data.sources]]: how its tables are read, and what is refused."""

import pytest

from titan_vlm.config import config_to_toml, load_config
from titan_vlm.data.config import Source
from titan_vlm.errors import ConfigError

TWO = """
[[data.sources]]
name = "a"
source = "openai"
path = "a.jsonl"
weight = 2
[[data.sources]]
name = "b"
source = "digits"
weight = 1
epochs = 3
"""


def load(tmp_path, text, *words):
    path = tmp_path / "x.toml"
    path.write_text(text)
    return load_config(str(path), words)


def test_a_list_of_tables_is_read_changed_by_number_and_written_back(tmp_path):
    config = load(
        tmp_path, TWO, "--data.sources[1].weight", "0.5", "--data.sources[0].path=c.jsonl"
    )
    assert config.data.sources == [
        Source("openai", "c.jsonl", name="a", weight=2.0),
        Source("digits", name="b", weight=0.5, epochs=3),
    ]
    assert load(tmp_path, config_to_toml(config)) == config
    replaced = load(tmp_path, TWO, '--data.sources=[{name = "x"}, {name = "y", split = "train"}]')
    assert [table.name for table in replaced.data.sources] == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        (
            TWO.replace("weight = 1", 'weight = "much"'),
            [],
            'data.sources[1].weight: expected finite float >= 0, got "much"',
        ),
        (
            TWO.replace("weight = 1", "wieght = 1"),
            [],
            "data.sources[1].wieght: unknown key; nearest known: data.sources[1].weight",
        ),
        (
            TWO.replace('"digits"', '"digit"'),
            [],
            'data.sources[1].source: expected digits|llava|openai|webdataset|hf, got "digit"',
        ),
        ("[data]\nsources = 3", [], "data.sources: expected tables [[data.sources]], got 3"),
        (
            "[data.sources]\nname = 'a'",
            [],
            'data.sources: expected tables [[data.sources]], got {"name": "a"}',
        ),
        ("[data]\nsources = [{name = 'a'}, 'b']", [], 'data.sources[1]: expected a table, got "b"'),
        (
            TWO,
            ["--data.sources[2].weight", "1"],
            "data.sources[2].weight: expected the number of one of 2 table(s), counted from 0",
        ),
        (
            TWO,
            ["--data.sources[1].weight", "-1"],
            "data.sources[1].weight: expected finite float >= 0, got -1.0",
        ),
        (
            TWO,
            ["--data.sources[n].weight", "1"],
            "data.sources[n].weight: unknown key; nearest known: data.sources[n].weight",
        ),
        (
            TWO,
            ["--data.sources[1].epoch", "1"],
            "data.sources[1].epoch: unknown key; nearest known: data.sources[1].epochs",
        ),
        (TWO, ["--data.sources", "a,b"], 'data.sources[0]: expected a table, got "a"'),
        (
            TWO.replace("weight = 1", ""),
            [],
            'data.sources[1].weight: expected a number > 0, as "a" has one, or a '
            "weight on no source; got none",
        ),
        (
            TWO.replace('"b"', '"a"'),
            [],
            'data.sources[1].name: expected a name of its own, got "a"',
        ),
        (
            TWO.replace('name = "b"', ""),
            [],
            'data.sources[1].name: expected a name of its own, got ""; metrics and '
            "the ledger call the source by it",
        ),
        (
            TWO.replace('path = "a.jsonl"', ""),
            [],
            "data.sources[0].path: expected a file, directory or glob for source = "
            '"openai", got ""',
        ),
        (
            TWO,
            ["--data.sources[1].path", "x"],
            'data.sources[1].path: expected none for source = "digits", got "x"',
        ),
        (
            TWO,
            ["--data.path", "x"],
            "data.path: expected none beside [[data.sources]], whose tables have "
            'their own, got "x"',
        ),
        (
            TWO,
            ["--data.split", "validation"],
            "data.split: expected none beside [[data.sources]], whose tables have "
            'their own, got "validation"',
        ),
        (
            TWO,
            ["--data.mixture_temperature", "2"],
            "data.mixture_temperature: expected 1 where data.sources have weights, "
            "got 2.0; it makes weights of numbers of samples",
        ),
        (
            "",
            ["--data.mixture_by", "tokens"],
            'data.mixture_by: expected "samples" without [[data.sources]], got "tokens"',
        ),
        (
            "",
            ["--data.mixture_temperature", "2"],
            "data.mixture_temperature: expected 1 without [[data.sources]], got 2.0",
        ),
        (
            TWO,
            ["--eval.path", "x"],
            "data.source: expected the format of eval.path, as [[data.sources]] "
            'may have several, got "digits"',
        ),
        (
            TWO,
            ["--data.source", "openai"],
            "data.source: expected none beside [[data.sources]] without eval.path, "
            'which nothing else reads, got "openai"',
        ),
        (
            TWO.replace('"digits"', '"openai"\npath="b"'),
            ["--eval.every", "5"],
            "eval.path: expected held-out data in the format of data.source, "
            "because eval.every is 5 and [[data.sources]] hold none out; or set eval.every = 0",
        ),
        (
            TWO,
            ["--data.source", "openai", "--eval.path", "./a.jsonl"],
            "eval.path: expected other data than data.sources[0]: validation on "
            "samples trained on measures nothing",
        ),
        (
            TWO,
            ["--data.sources[1].split", "validation"],
            "eval.split: expected other data than data.sources[1]: validation on "
            "samples trained on measures nothing",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(tmp_path, text, words, said):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *words)
    assert str(caught.value).split(": ", 1)[1] == said
