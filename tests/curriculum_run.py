"""A run in three stages, and the same by hand: three runs, with what goes on carried over.

By hand means: each stage's settings as words of its own command line, rows packed here from lists
of positions, AdamW, clipping and the loss written out. Of the program only the model, the encoder
and the learning rate's curve are used, which other tests compare with references of their own.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.small_run import curve, small_config
from titan_vlm import train
from titan_vlm.assembly import assemble, build_model, fill
from titan_vlm.data.chat import Encoder
from titan_vlm.data.ledger import read_ledger
from titan_vlm.data.mixture import EpochOrder
from titan_vlm.data.rows import collate, make_row
from titan_vlm.data.sources import build_source
from titan_vlm.models.moe.tokens import Moment
from titan_vlm.training.schedule import lr_factor

# Name, unit and amount of the length, and what it changes, as TOML has it.
STAGES = [
    (
        "align",
        *("steps", 2),
        {
            "training.freeze": '["vision"]',
            "training.seq_len": "128",
            "optimizer.lr": "2e-3",
            "schedule.kind": '"constant"',
            "moe.text.top_k": "1",
            "moe.text.aux_loss": "0.1",
            "moe.text.asleep": "[1, 2]",
        },
    ),
    (
        "all",
        *("tokens", 1500),
        {
            "training.seq_len": "96",
            "training.global_batch_size": "8",
            "optimizer.branch_lr": "{ vision = 5e-4 }",
            "data.min_pixels": "4096",
            "moe.text.capacity_factor": "1.5",
            "moe.text.noise": '"jitter"',
            "moe.text.noise_eps": "0.1",
            "moe.text.asleep": "[2]",
        },
    ),
    (
        "tune",
        *("samples", 30),
        {
            "training.freeze": '["projector", "*layers.1.attn*"]',
            "schedule.kind": '"linear"',
            "schedule.warmup_steps": "2",
            "data.min_pixels": "2048",
        },
    ),
]
SHARED = {
    "training__dtype": "float64",
    "training__global_batch_size": "4",
    "training__micro_batch_size": "2",
    "training__steps": "1000",
    "moe__text__aux_loss": "0.01",
    "schedule__warmup_steps": "0",
    "checkpoint__every": "1",
    "checkpoint__keep_latest_k": "0",
    "checkpoint__export_hf": "false",
    "data__ledger": "true",
    "eval__samples": "1",
}
BETAS, EPS, DECAY, SHARDS, WINDOW = (0.9, 0.95), 1e-8, 0.1, 4, 4


def stages_toml(stages) -> str:
    """The stages as one word of a command line."""
    tables = [
        ", ".join(
            [f'name = "{name}"', f"{unit} = {amount}", *(f"{k} = {v}" for k, v in own.items())]
        )
        for name, unit, amount, own in stages
    ]
    return "[" + ", ".join(f"{{{table}}}" for table in tables) + "]"


def in_stages(**changes: str) -> dict[str, str]:
    """The changes that make the small run this one."""
    return SHARED | {"curriculum__stages": stages_toml(STAGES)} | changes


class Rows:
    """The positions that wait in each virtual shard, and the next that is read."""

    def __init__(self):
        self.next, self.cursors = 0, list(range(SHARDS))
        self.waiting = [[] for _ in range(SHARDS)]

    def take(self, encode, seq_len):
        shard = self.next % SHARDS
        self.next += 1
        self.waiting[shard] = [p for p in self.waiting[shard] if len(encode(p)) <= seq_len]
        row, space = [], seq_len
        while True:
            while len(self.waiting[shard]) < WINDOW:
                position = self.cursors[shard]
                self.cursors[shard] += SHARDS
                if len(encode(position)) <= seq_len:
                    self.waiting[shard].append(position)
            fits = [p for p in self.waiting[shard] if len(encode(p)) <= space]
            if not fits:
                return row
            self.waiting[shard].remove(fits[0])
            row.append(encode(fits[0]))
            space -= len(row[-1])


def by_hand(folder, stages=STAGES):
    """(losses, parameters by name, [number of steps] of the stages, ids by row of each step)."""
    rows, weights, moments = Rows(), None, {}
    losses, lengths, read, asleep = [], [], [], set()
    for _, unit, amount, own in stages:
        words = {key.replace(".", "__"): value.strip('"') for key, value in own.items()}
        config = small_config(folder, **(SHARED | words))
        parts = assemble(config)
        model = build_model(parts, config)
        fill(model, parts, config, torch.device("cpu"), fresh=weights is None)
        named = dict(model.named_parameters())
        if weights is not None:
            for name, parameter in named.items():
                parameter.data.copy_(weights[name])
        for layer in asleep - set(config.moe.text.asleep):
            wake(layer, named, moments)
        asleep = set(config.moe.text.asleep)
        frozen = {n for pattern in config.training.freeze for n in matching(model, pattern)}
        for name in frozen:
            named[name].requires_grad_(False)
            moments.pop(name, None)

        order = EpochOrder(len(build_source(config.data, "train", 0)), 0)
        encode = encoder_of(config, parts, order)
        done = {"steps": 0, "tokens": 0, "samples": 0}
        while done[unit] < amount:
            batch_rows = [
                rows.take(encode, config.training.seq_len)
                for _ in range(config.training.global_batch_size)
            ]
            read.append([[sample.id for sample in row] for row in batch_rows])
            steps = amount if unit == "steps" else estimate(done, unit, amount)
            factor = lr_factor(done["steps"], config.schedule, steps)
            losses.append(step(model, batch_rows, config, parts, len(losses)))
            clip(named)
            rates = {n: factor * rate_of(n, config, model) for n in named}
            adamw(named, moments, rates)
            done["steps"] += 1
            done["samples"] += sum(map(len, batch_rows))
            done["tokens"] += sum(len(sample) for row in batch_rows for sample in row)
        lengths.append(done["steps"])
        weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    return losses, weights, lengths, read


def assert_is(output, hand):
    """The run in `output`, which is at its end, has losses, weights and samples of `by_hand`."""
    losses, weights, _, read = hand
    assert [loss for _, loss, _ in curve(output)] == pytest.approx(losses, rel=1e-9)
    try:
        state = train.prepare(small_config(output, **in_stages())).model.state_dict()
    finally:
        dist.destroy_process_group()
    for name, wanted in weights.items():
        torch.testing.assert_close(state[name], wanted, rtol=1e-9, atol=1e-9, msg=name)
    steps = read_ledger(output)
    assert [steps[n].rows for n in sorted(steps)] == read


def estimate(done, unit, amount):
    return done["steps"] * amount / done[unit] if done[unit] else float("inf")


def encoder_of(config, parts, order):
    encoder, source, known = Encoder(parts.tokenizer, parts.images), None, {}
    source = build_source(config.data, "train", 0)

    def encode(position):
        if position not in known:
            known[position] = encoder.encode(source[order[position]])
            epoch, number = divmod(order[position], order.size)
            known[position].id = f"digits:{epoch}:{number}"
        return known[position]

    return encode


def matching(model, pattern):
    branches = model.branches()
    if pattern in branches:
        return branches[pattern]
    start, end = pattern.strip("*").rsplit(".", 1)
    return [name for name in dict(model.named_parameters()) if f"{start}.{end}" in name]


def rate_of(name, config, model):
    rates = config.optimizer.branch_lr
    branch = next(b for b, names in model.branches().items() if name in names)
    return rates.get(branch, config.optimizer.lr)


def step(model, batch_rows, config, parts, number):
    """Gradients of one step; returns its loss."""
    encoder = Encoder(parts.tokenizer, parts.images)
    made = [make_row(row, config.training.seq_len, encoder) for row in batch_rows]
    micro = config.training.micro_batch_size
    count = len(made) // micro
    batches = [
        collate(made[i * micro : (i + 1) * micro], Moment(0, number, i, count))
        for i in range(count)
    ]
    targets, total = sum(int(batch.num_targets) for batch in batches), 0.0
    for batch in batches:
        logits_BSV = model(batch)
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), batch.labels_BS.flatten(), reduction="sum")
        (loss / targets).backward()
        total += float(loss.detach()) / targets
    return total


def clip(named, most=1.0):
    grads = [p.grad for p in named.values() if p.grad is not None]
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    for grad in grads:
        grad *= min(1.0, most / (float(norm) + 1e-6))


@torch.no_grad()
def adamw(named, moments, rates):
    for name, parameter in named.items():
        if parameter.grad is None:
            continue
        m, v, t = moments.get(name, (torch.zeros_like(parameter), torch.zeros_like(parameter), 0))
        m = BETAS[0] * m + (1 - BETAS[0]) * parameter.grad
        v = BETAS[1] * v + (1 - BETAS[1]) * parameter.grad**2
        t += 1
        moments[name] = (m, v, t)
        if parameter.ndim >= 2 and "pos_embed" not in name and not name.endswith("bias"):
            parameter -= rates[name] * DECAY * parameter
        first, second = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
        parameter -= rates[name] * first / (second.sqrt() + EPS)
        parameter.grad = None


@torch.no_grad()
def wake(layer, named, moments):
    for name, parameter in named.items():
        if f"layers.{layer}.moe.experts." in name:
            parameter[:] = parameter[0].clone()
            if name in moments:
                m, v, t = moments[name]
                moments[name] = (m[:1].expand_as(m).clone(), v[:1].expand_as(v).clone(), t)
