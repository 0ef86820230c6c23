"""A run's answers are the same with its experts on one rank, spread, and with copies of some."""

import json

import pytest
import torch

from scripts.check_export import random_export
from scripts.generate import answer, main
from tests.small_run import small_config
from titan_vlm.config import config_to_toml, load_config
from titan_vlm.errors import ConfigError
from titan_vlm.inference.experts import last_loads
from titan_vlm.models.moe.placement import balanced, imbalance, linear, rank_loads
from titan_vlm.models.moe.router import Router


@pytest.fixture(scope="module")
def finished(tmp_path_factory, world):
    """What a run leaves behind: weights by which answers differ, and their experts' loads."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config(folder, eval__samples="12", eval__max_new_tokens="6")
    (folder / "config.toml").write_text(config_to_toml(config))
    random_export(config, folder / "hf")
    (loads,) = world.run(1, measure, config, folder)
    report = {"step": 6, "layers": {name: {"load": load} for name, load in loads.items()}}
    (folder / "moe.jsonl").write_text(json.dumps(report) + "\n")
    return folder


def measure(config, folder):
    """Pairs of each expert while the questions are answered, by the routings themselves."""
    loads: dict[str, torch.Tensor] = {}

    def note(router, _, routing):
        loads[router.name] = loads.get(router.name, 0) + routing.counts_E

    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *rest: note(module, *rest) if isinstance(module, Router) else None
    )
    answer(config, folder, 0)
    hook.remove()
    return {name.removesuffix(".moe"): load_E.tolist() for name, load_E in loads.items()}


def answers(folder, redundant):
    config = load_config(str(folder / "config.toml"))
    result, imbalance = answer(config, folder, redundant)
    return [given.given for given in result.answers], result.loss, imbalance


def test_redundant_experts_change_no_answer_and_even_out_the_ranks(world, finished):
    ((alone, loss, one),) = world.run(1, answers, finished, 0)
    assert len(alone) == 12 and len(set(alone)) > 1 and one == 1.0
    spread, copied = (world.run(4, answers, finished, redundant) for redundant in (0, 8))
    for given, its_loss, _ in (*spread, *copied):
        assert given == alone
        assert its_loss == pytest.approx(loss, rel=1e-5)
    before, after = spread[0][2], copied[0][2]
    assert before > 1.2 and after < 1.05
    assert {result[2] for result in copied} == {after}  # every rank knows all ranks' work


def test_the_drawing_of_the_module():
    load_E = torch.tensor([6, 6, 2, 2, 1, 1, 1, 1])
    assert rank_loads(load_E, linear(8), 2).tolist() == [16, 4]
    logical_S = balanced(load_E, 2, 10)
    assert imbalance(rank_loads(load_E, logical_S, 2)) == 1.0
    assert logical_S.tolist() == [4, 5, 1, 1, 2, 3, 0, 0, 6, 7]


def test_the_script_answers_alone_and_says_what_is_wrong(finished, capfd):
    assert main([str(finished), "--samples", "3"]) == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures["samples"] == 3 and figures["imbalance"] == 1.0
    for words, said in (
        (["--redundant-experts", "4"], "one process has all experts"),
        (["--redundant-experts", "-1"], "expected 0 or more"),
        (["--samples", "0"], "eval.samples"),
    ):
        assert main([str(finished), *words]) == 2
        assert said in capfd.readouterr().err
    assert main(["nowhere"]) == 2


def test_loads_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="moe.jsonl: expected the loads"):
        last_loads(tmp_path)


def test_numbers_that_do_not_divide_are_refused_with_one_that_does(world, finished):
    assert all("use 4" in said for said in world.run(4, refusal, finished, 3))


def refusal(folder, redundant):
    try:
        answers(folder, redundant)
    except ConfigError as error:
        return str(error)
