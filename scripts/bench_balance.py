"""How evenly each way of balancing loads the experts, and what it costs the loss: one short run of
the demo each, one after the other, from the same weights on the same data.

    scripts/bench_balance.py                    200 steps each; a table, and one page of all runs
    scripts/bench_balance.py --only qwen none   some of them
    scripts/bench_balance.py --steps 50 -- --training.seq_len 128       words for the trainer

The imbalance of a layer is the pairs of its busiest expert over the mean; the table has the worst
layer's, over the last reports of the run, the first step from which it stays below the aim, and the
mean loss of the last reports beside that of the run without balance.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

AIM = 1.3
LAST = 5  # reports that a figure is the mean of
# Questions about digits in rows that are soon learned to pieces: a load as skewed as it gets.
DEMO = {
    "training.seq_len": "256",
    "training.global_batch_size": "8",
    "training.micro_batch_size": "8",
    "schedule.warmup_steps": "20",
    "metrics.log_every": "5",
    "metrics.tensorboard": "false",
    "checkpoint.every": "0",
    "checkpoint.export_hf": "false",
    "moe.text.aux_loss": "0",
    "eval.samples": "50",
}
METHODS: dict[str, dict[str, str]] = {
    "none": {},
    "aux_loss": {"aux_loss": "0.02"},
    "sequence_loss": {"sequence_loss": "0.02"},
    "importance_loss": {"importance_loss": "0.1"},
    "z_loss": {"z_loss": "0.001"},
    "sign bias, sigmoid": {"score": "sigmoid", "bias_update": "sign", "bias_speed": "0.01"},
    "sign bias + sequence_loss": {
        "score": "sigmoid",
        "bias_update": "sign",
        "bias_speed": "0.01",
        "sequence_loss": "0.002",
    },
    "quantile bias, sigmoid": {"score": "sigmoid", "bias_update": "quantile"},
    "noisy_topk, cv losses": {
        "router": "noisy_topk",
        "score": "softmax_topk",
        "cv_importance": "0.02",
        "cv_load": "0.02",
    },
    "threshold, sigmoid": {
        "router": "threshold",
        "score": "sigmoid",
        "normalize": "false",
        "ema_decay": "0.9",
    },
    "capacity 1.25": {"capacity_factor": "1.25"},
    "expert_choice": {
        "router": "expert_choice",
        "capacity_factor": "1.0",
        "normalize": "false",
        "allow_noncausal": "true",
    },
}


def train(folder: Path, steps: int, method: dict[str, str], words: list[str]) -> None:
    settings = DEMO | {"training.steps": str(steps), "run.output_dir": str(folder)}
    settings |= {f"moe.text.{key}": value for key, value in method.items()}
    given = [word for key, value in settings.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "titan_vlm.train", "--config", "qwen_vlm_moe.toml"]
    subprocess.run([*command, *given, *words], check=True, stdout=subprocess.DEVNULL)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(folder: Path) -> dict[str, float]:
    """Worst imbalance, the step it stays below the aim from, loss and exact answers."""
    worst = [
        (r["step"], max(max(x["load"]) * len(x["load"]) / max(sum(x["load"]), 1) for x in layers))
        for r in records(folder / "moe.jsonl")
        if (layers := list(r["layers"].values()))
    ]
    above = [step for step, imbalance in worst if imbalance >= AIM]
    log = records(folder / "metrics.jsonl")
    losses = [r["loss"] for r in log if "loss" in r]
    return {
        "imbalance": mean([imbalance for _, imbalance in worst][-LAST:]),
        "below_from": max(above, default=0),
        "loss": mean(losses[-LAST:]),
        "exact": [r["eval/exact"] for r in log if "eval/exact" in r][-1],
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("runs/balance"))
    parser.add_argument("words", nargs="*", help="for the trainer, behind --")
    arguments = parser.parse_args(argv)
    folders, found = [], {}
    print(f"{'':<28}{'max/mean':>9}{'< ' + str(AIM) + ' from':>12}{'loss':>8}{'exact':>7}")
    for name in arguments.only:
        folder = arguments.output / name.replace(" ", "_").replace(",", "")
        folders.append(folder)
        train(folder, arguments.steps, METHODS[name], arguments.words)
        found[name] = of = summary(folder)
        begins = f"step {of['below_from']}" if of["imbalance"] < AIM else "never"
        print(
            f"{name:<28}{of['imbalance']:>9.2f}{begins:>12}{of['loss']:>8.3f}{of['exact']:>7.2f}",
            flush=True,
        )
    report = Path(__file__).with_name("moe_report.py")
    page = arguments.output / "balance.html"
    subprocess.run([sys.executable, report, *folders, "-o", page], check=True)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
