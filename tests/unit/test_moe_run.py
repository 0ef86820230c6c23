"""Routing through whole runs: what is reported, saved and refused."""

import json

import pytest
import torch

from tests.small_run import curve, run, run_killed, small_config
from titan_vlm import train
from titan_vlm.models.moe.layer import moe_layers

STEERED = {
    "checkpoint__export_hf": "false",
    "moe__text__score": "sigmoid",
    "moe__text__bias_update": "sign",
    "moe__text__bias_speed": "0.05",
    "moe__text__sequence_loss": "0.01",
    "moe__text__capacity_factor": "0.7",
    "metrics__log_every": "2",
}


def records(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "loss" in r]


def layers_of(output):
    """The figures of each report, by layer; without times, which are never the same."""
    lines = [json.loads(x)["layers"] for x in (output / "moe.jsonl").read_text().splitlines()]
    timed = ("_ms", "_ms_max", "_share")
    return [
        {n: {k: x for k, x in of.items() if not k.endswith(timed)} for n, of in layers.items()}
        for layers in lines
    ]


def state_of(output, **changes):
    run = train.prepare(small_config(output, **changes))
    run.loader.close()
    torch.distributed.destroy_process_group()
    return {name: x.clone() for name, x in run.model.state_dict().items()}


def test_a_resumed_run_has_the_biases_and_counts_of_the_one_that_never_died(tmp_path):
    assert run(tmp_path / "whole", **STEERED) == 0
    run_killed(tmp_path / "killed", 3, **STEERED)  # between two reports
    assert run(tmp_path / "killed", **STEERED) == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    for ours, theirs in zip(records(tmp_path / "killed"), records(tmp_path / "whole"), strict=True):
        experts = [key for key in theirs if key.startswith("experts/")]
        assert len(experts) == 9
        assert {key: ours[key] for key in experts} == {key: theirs[key] for key in experts}
    ours, theirs = layers_of(tmp_path / "killed"), layers_of(tmp_path / "whole")
    assert ours == theirs and len(theirs) == 3 and len(theirs[0]["text.layers.1"]) > 9
    ours, theirs = state_of(tmp_path / "killed", **STEERED), state_of(tmp_path / "whole", **STEERED)
    biases = [name for name in theirs if name.endswith("bias_E")]
    assert len(biases) == 3
    assert max(theirs[name].abs().max() for name in biases) > 0.03
    assert [name for name, x in theirs.items() if not torch.equal(ours[name], x)] == []


def test_a_run_says_what_its_routers_do(tmp_path):
    assert run(tmp_path, **STEERED) == 0
    for record, layers in zip(records(tmp_path), layers_of(tmp_path), strict=True):
        assert list(layers) == [f"text.layers.{i}" for i in (1, 2, 3)]
        for figures in layers.values():
            assert 0 < figures["drop_rate"] < 1
            assert 0 < figures["gate_entropy"] < 2.08  # log 8
            assert figures["logit_rms"] > 0
            assert figures["balance_loss"] == pytest.approx(0.01 * figures["sequence_loss"])
        wanted = sum(figures["balance_loss"] for figures in layers.values())
        assert record["balance_loss"] == pytest.approx(wanted)


def test_logits_that_are_not_finite_end_the_run_before_a_weight_changes(
    tmp_path, monkeypatch, capsys
):
    steps = []

    def poison(run, batches, targets):
        if run.step == 2:
            with torch.no_grad():
                moe_layers(run.model)["text.layers.2"].router.weight.fill_(float("inf"))
            steps.append({n: p.detach().clone() for n, p in run.model.named_parameters()})
            steps.append(run.model)
        return forward_backward(run, batches, targets)

    forward_backward = train.forward_backward
    monkeypatch.setattr(train, "forward_backward", poison)
    assert run(tmp_path, checkpoint__export_hf="false", guards__max_skips="0") == 2
    said = capsys.readouterr().err.strip()
    assert "step 3: router logits of text.layers.2 and of 1 other layers are not finite" in said
    before, model = steps
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_gates_of_a_bfloat16_run_are_gathered_in_float32(tmp_path):
    run = train.prepare(small_config(tmp_path, training__dtype="bfloat16"))
    seen = {}
    for name, layer in moe_layers(run.model).items():
        layer.router.register_forward_hook(
            lambda module, args, out, name=name: seen.update(
                {name: (module.weight.dtype, args[0].dtype, out.weights_P.dtype)}
            )
        )
        layer.experts.register_forward_hook(
            lambda module, args, out, name=name: seen.update({f"{name}.experts": module.down.dtype})
        )
    from tests.small_run import Silent

    train.train_step(run, Silent())
    run.loader.close()
    torch.distributed.destroy_process_group()
    assert len(seen) == 6
    for name, dtypes in seen.items():
        if name.endswith("experts"):
            assert dtypes == torch.bfloat16
        else:
            assert dtypes == (torch.float32, torch.bfloat16, torch.float32)


def test_a_frozen_router_keeps_its_bias(tmp_path):
    from tests.small_run import Silent

    steered = {key: value for key, value in STEERED.items() if "metrics" not in key}
    run = train.prepare(small_config(tmp_path, **steered, training__freeze="*layers.1.moe.router*"))
    train.train_step(run, Silent())
    run.loader.close()
    torch.distributed.destroy_process_group()
    biases = {n: layer.router.steering.bias_E for n, layer in moe_layers(run.model).items()}
    assert not biases["text.layers.1"].any()
    assert biases["text.layers.2"].any()


def test_what_transformers_cannot_hold_is_not_converted_either(tmp_path, capsys):
    from scripts import convert

    assert run(tmp_path, checkpoint__export_hf="false", moe__text__shared_width="32") == 0
    capsys.readouterr()
    step = tmp_path / "checkpoints" / "step-000006"
    assert convert.main([str(step), str(tmp_path / "hf")]) == 2
    said = capsys.readouterr().err
    assert "no shared expert (moe.text.shared_width = 32)" in said and said.count("\n") == 1
