"""Answers of a finished run to held-out questions, its experts spread over the processes.

    .venv/bin/python scripts/generate.py runs/qwen_vlm_moe
    .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 4 \\
        scripts/generate.py runs/qwen_vlm_moe --redundant-experts 4

With --redundant-experts every MoE layer has room for so many copies of those experts that had most
to do in the last report of the run (`moe.jsonl`). Reads the run's export (`hf/`), in float32; the
processes answer the same questions together. The last line is one JSON object: `imbalance` is
largest / mean pairs computed by a process, of the worst layer.
"""

import argparse
import json
import sys
from pathlib import Path

import torch.distributed as dist

from titan_vlm import distributed
from titan_vlm.assembly import assemble_export
from titan_vlm.config import Config, load_config
from titan_vlm.data.chat import Encoder
from titan_vlm.errors import ConfigError, UserError
from titan_vlm.evaluation.validate import Result, Validator
from titan_vlm.inference.experts import last_loads, rank_imbalance, spread_experts
from titan_vlm.mesh import AXES, build_mesh
from titan_vlm.training.curriculum import last_config


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="directory of a finished run with an export")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--redundant-experts", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        folder = Path(arguments.run)
        config = load_config(
            str(folder / "config.toml"), ["--eval.samples", str(arguments.samples)]
        )
        result, imbalance = answer(last_config(config), folder, arguments.redundant_experts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not distributed.is_hidden_rank():
        for given in result.answers:
            print(f"  {given.question} -> {given.given!r} (expected {given.expected!r})")
        figures = {"samples": len(result.answers), "accuracy": result.accuracy}
        print(json.dumps(figures | {"loss": result.loss, "imbalance": imbalance}))
    return 0


def answer(config: Config, folder: Path, redundant: int) -> tuple[Result, float]:
    """What the export of a run says, and largest / mean work of the ranks in the worst layer.

    To be called by every process.
    """
    if redundant < 0:
        raise ConfigError(f"--redundant-experts {redundant}: expected 0 or more")
    device = distributed.start(config.run.device, config.comm)
    degrees = dict.fromkeys(AXES, 1) | {"ep": dist.get_world_size()}
    mesh = build_mesh(device.type, degrees, over_tp=False)
    parts = assemble_export(config)
    model = parts.spec.build(parts.dims)
    parts.spec.load_hf(model, str(folder / "hf"))
    spread_experts(
        model.to(device).eval(), mesh, redundant, last_loads(folder) if redundant else {}
    )
    validator = Validator(config, Encoder(parts.tokenizer, parts.images))
    with rank_imbalance(model) as by_layer:
        result = validator.run(model, device)
    return result, max(by_layer.values(), default=1.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
