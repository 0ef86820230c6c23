"""Validation: loss and exact-match accuracy on samples that training never reads.

Every rank validates the same samples, so that the collectives of a sharded model always meet and
every rank knows the same result.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from titan_vlm import distributed
from titan_vlm.config import Config
from titan_vlm.conflicts import holds_out_digits, is_same_data
from titan_vlm.data.chat import Encoder, Sample, text_of
from titan_vlm.data.rows import collate, make_row
from titan_vlm.data.sample import RawSample
from titan_vlm.data.sources import build_held_out
from titan_vlm.data.sources.hf import has_split
from titan_vlm.errors import ConfigError, DataError
from titan_vlm.inference.generate import Prompt, greedy
from titan_vlm.stages import Stage
from titan_vlm.training.loss import chunked_cross_entropy
from titan_vlm.training.metrics import MetricsLogger

logger = logging.getLogger(__name__)


@dataclass
class Answer:
    """One decoded answer beside the right one."""

    question: str
    kind: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        return self.given.strip() == self.expected.strip()


@dataclass
class Result:
    """Mean loss per target token, and the answers."""

    loss: float
    answers: list[Answer]

    @property
    def accuracy(self) -> float:
        return sum(a.right for a in self.answers) / max(len(self.answers), 1)

    def accuracy_by_kind(self) -> dict[str, float]:
        """For sources that name kinds of question; one entry, "all", for the others."""
        kinds = defaultdict(list)
        for answer in self.answers:
            kinds[answer.kind].append(answer.right)
        return {kind: sum(right) / len(right) for kind, right in sorted(kinds.items())}

    def report(self, step: int, metrics: MetricsLogger, show: int) -> None:
        """With some answers to look at."""
        kinds = self.accuracy_by_kind()
        values = {"loss": self.loss, "exact": self.accuracy}
        values |= {f"exact/{kind}": value for kind, value in kinds.items() if len(kinds) > 1}
        metrics.report(step, values)
        for answer in self.answers[:show]:
            mark = "right" if answer.right else f"expected {answer.expected!r}"
            metrics.print(f"      {answer.question} -> {answer.given!r} ({mark})")


def build_validators(stages: Iterable[Stage]) -> dict[str, "Validator | None"]:
    """By stage of the run; all at start, so that what is refused is refused then."""
    found: dict[str, Validator | None] = {}
    for stage in stages:
        encoder = Encoder(stage.parts.tokenizer, stage.parts.images)
        try:
            held_out = has_held_out_data(stage.config)
            found[stage.name] = Validator(stage.config, encoder) if held_out else None
        except DataError as error:
            if not stage.name:
                raise
            raise DataError(f'stage "{stage.name}": {error}') from error
    return found


def facts(validators: Mapping[str, "Validator | None"]) -> dict[str, Any]:
    """Of the held-out samples of every stage: what must be the same on all ranks."""
    return {
        f"{fact} of stage {stage}" if stage else fact: value
        for stage, validator in validators.items()
        if validator
        for fact, value in validator.facts.items()
    }


class Validator:
    """Holds the encoded held-out samples of a run.

    Raises:
        DataError: none of the held-out samples can be used.
    """

    def __init__(self, config: Config, encoder: Encoder):
        source = build_held_out(config)
        self.config, self.encoder = config, encoder
        self.samples: list[tuple[RawSample, Sample]] = []
        digest = hashlib.blake2b(digest_size=8)
        for i in range(min(config.eval.samples, len(source))):
            try:
                raw = source[i]
                sample = encoder.encode(raw)
                if len(sample) > config.training.seq_len:
                    raise DataError(f"{raw.origin}: longer than training.seq_len")
                for visual in sample.visuals:
                    visual.pixels(encoder.spec)
                self.samples.append((raw, sample))
                digest.update(b"%d %d" % (i, len(sample)))
                digest.update(sample.tokens_L.tobytes())
            except DataError as error:
                logger.warning("held-out sample skipped: %s", error)
        if not self.samples:
            raise DataError("validation: none of the held-out samples can be used")
        # What must be the same on all ranks.
        self.facts = {
            "number of held-out samples that can be used": len(self.samples),
            "digest of the held-out samples": digest.hexdigest(),
        }

    @torch.no_grad()
    def run(self, model: nn.Module, device: torch.device) -> Result:
        """Loss and answers of `model`; training statistics stay untouched."""
        was_training = model.training
        model.eval()
        result = Result(self._loss(model, device), self._answers(model, device))
        model.train(was_training)
        return result

    def _loss(self, model: nn.Module, device: torch.device) -> float:
        total = torch.zeros((), dtype=torch.float64, device=device)
        targets = 0
        for row in self._rows():
            with distributed.together():  # a picture may be gone since, for one rank alone
                made = make_row(row, self.config.training.seq_len, self.encoder)
            batch = collate([made]).to(device)
            total += model(
                batch,
                lambda hidden, weight, labels=batch.labels_BS: chunked_cross_entropy(
                    hidden, weight, labels, self.config.training.loss_chunk_tokens
                ),
            )
            targets += int(batch.num_targets)
        return float(total) / max(targets, 1)

    def _rows(self) -> list[list[Sample]]:
        """The samples in order, as many to a row as fit."""
        rows: list[list[Sample]] = []
        room = -1
        for _, sample in self.samples:
            if len(sample) > room:
                rows.append([])
                room = self.config.training.seq_len
            rows[-1].append(sample)
            room -= len(sample)
        return rows

    def _answers(self, model: nn.Module, device: torch.device) -> list[Answer]:
        tokenizer = self.encoder.tokenizer
        asked = [
            (raw, turn)
            for raw, _ in self.samples
            if (turn := last_assistant_turn(raw.messages)) is not None
        ]
        with distributed.together():
            prompts = [make_prompt(self.encoder, raw.messages[:turn]) for raw, turn in asked]
        stop_ids = {tokenizer.eos_token_id}
        decoded = greedy(model, prompts, stop_ids, self.config.eval.max_new_tokens, device)
        return [
            Answer(
                question=shown(raw.messages[turn - 1]) if turn else "",
                kind=raw.meta.get("kind", "all"),
                expected=text_of(raw.messages[turn]),
                given=tokenizer.decode(tokens, skip_special_tokens=True),
            )
            for (raw, turn), tokens in zip(asked, decoded, strict=True)
        ]


def last_assistant_turn(messages: list[dict]) -> int | None:
    """Index of the last message that the assistant wrote."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return turns[-1] if turns else None


def shown(message: dict) -> str:
    """The text of a message with its pictures as <image>."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(p["text"] if p["type"] == "text" else f"<{p['type']}>" for p in content)


def make_prompt(encoder: Encoder, messages: list[dict]) -> Prompt:
    """Tokens and pixels of a conversation that the assistant is to continue."""
    sample = encoder.encode_prompt(messages)
    pixels = [visual.pixels(encoder.spec) for visual in sample.visuals]
    pixels.append(np.empty((0, encoder.spec.patch_dim), np.float32))
    return Prompt(
        tokens_L=torch.from_numpy(sample.tokens_L),
        positions_3L=torch.from_numpy(sample.positions_3L),
        visual_L=torch.from_numpy(sample.visual_L),
        pixels_NC=torch.from_numpy(np.concatenate(pixels)),
        grids=[visual.grid for visual in sample.visuals],
    )


def has_held_out_data(config: Config) -> bool:
    """Sources without splits hold data out only where `eval.path` names it; a Hugging Face dataset
    also where it has the split `eval.split`."""
    data, evaluation = config.data, config.eval
    if data.sources or data.source != "hf" or not is_same_data(evaluation.path, data.path):
        return bool(evaluation.path) or holds_out_digits(data)
    if has_split(data.path, evaluation.split):
        return True
    if evaluation.every:
        raise ConfigError(
            f'eval.split = "{evaluation.split}": {data.path} has no such split and eval.every is '
            f"{evaluation.every}; name another one or eval.path, or set eval.every = 0"
        )
    logger.info('no validation: %s has no split "%s"', data.path, evaluation.split)
    return False
