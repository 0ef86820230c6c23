"""The embedded demo: real handwritten digits composed into questions about pictures.

scikit-learn carries 1,797 scans of 8 x 8 pixels. They are split by scan: what validation asks
about was written by no hand that training saw in that very form. A sample is a pure function of
(seed, split, index): index // len is the epoch, and training draws another composition, phrasing
and distortion in each.

    which    one digit                       Which digit is this?                 7
    sum      two pictures                    What is the sum of the two digits?   12
    larger   two pictures                    Which digit is larger?               8
    row      one wide picture of 2 to 5      Read the row of digits.              3062
    count    one picture of 2 x 2 or 1 x 4   How many times is the digit 4 here?  2

and, where a source names its kinds (data.sources[n].kinds),

    between  pictures between words          [3] plus [4] plus [1]                8
    words    no picture                      3 4 Add the two digits.              7

Slot i of an epoch has kind KIND_CYCLE[i % C]; over an epoch the first digit of each of the C kinds
walks through all scans, each from its own start, so that even a few slots show many scans.
Pictures are drawn only when a row is emitted.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from titan_vlm.data.sample import ImageRef, RawSample, image_part, text_part
from titan_vlm.errors import ConfigError

CELL = 32  # pixels of one digit's side: one visual token at patch 16, merge 2
TRAIN_SCANS = 1500
SCANS = 1797
KIND_CYCLE = ("which", "sum", "row", "larger", "which", "count", "row", "sum")

KINDS = (*dict.fromkeys(KIND_CYCLE), "between", "words")

PHRASINGS = {
    "which": ("Which digit is this?", "What digit do you see?", "Name the digit."),
    "sum": (
        "What is the sum of the two digits?",
        "Add the two digits.",
        "What do the digits add up to?",
    ),
    "larger": (
        "Which digit is larger?",
        "Name the larger digit.",
        "What is the larger of the two digits?",
    ),
    "row": ("Read the row of digits.", "Which digits are in the row?", "Name the digits in order."),
    "count": (
        "How many times is the digit {d} here?",
        "Count the digit {d}.",
        "How many of the digits are {d}?",
    ),
}


class DigitsSource:
    """`source[i]` for any i >= 0; see the module's text. `kinds` of questions, in turn; by default
    those of `KIND_CYCLE`."""

    def __init__(self, split: str, seed: int, cell: int = CELL, kinds: Sequence[str] = ()):
        if split not in ("train", "validation"):
            raise ConfigError(
                f'data.split: the digits have "train" and "validation", not "{split}"'
            )
        self.split, self.seed, self.cell = split, seed, cell
        self.cycle = tuple(kinds) or KIND_CYCLE
        pixels, labels = load_scans()
        # The split is a fact of the demo, not of the run: it never depends on the run's seed.
        order = random.Random("digits split").sample(range(SCANS), SCANS)
        mine = order[:TRAIN_SCANS] if split == "train" else order[TRAIN_SCANS:]
        self.scans = [Image.fromarray(pixels[k]) for k in mine]
        self.labels = [int(labels[k]) for k in mine]

    def __len__(self) -> int:
        return len(self.scans) * len(self.cycle)

    def __getitem__(self, index: int) -> RawSample:
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        slot = index % len(self)
        step, place = divmod(slot, len(self.cycle))
        kind = self.cycle[place]
        first = (step + place * len(self.scans) // len(self.cycle)) % len(self.scans)
        if kind in ("between", "words"):
            parts, question, answer = getattr(self, f"_{kind}")(first, rng)
        else:
            layouts, question, answer = self._compose(kind, first, rng)
            images = [self._image(layout, rng) for layout in layouts]
            parts = [*map(image_part, images), text_part(question)]
        return RawSample(
            id=f"digits/{self.split}/{index}",
            origin=f"digits/{self.split}:{index}",
            messages=[
                {"role": "user", "content": parts},
                {"role": "assistant", "content": [text_part(answer)]},
            ],
            meta={"kind": kind, "answer": answer, "question": question},
        )

    def _compose(self, kind: str, first: int, rng: random.Random):
        """([rows of scan numbers per picture], question, answer)."""
        question = rng.choice(PHRASINGS[kind])
        if kind == "which":
            return [[[first]]], question, str(self.labels[first])
        if kind == "row":
            row = [first, *self._draw(rng, rng.randint(1, 4))]
            return [[row]], question, "".join(str(self.labels[k]) for k in row)
        if kind == "count":
            return self._compose_count(first, question, rng)
        (second,) = self._draw(rng, 1)
        while kind == "larger" and self.labels[second] == self.labels[first]:
            (second,) = self._draw(rng, 1)
        pair = [first, second]
        rng.shuffle(pair)
        values = [self.labels[k] for k in pair]
        answer = sum(values) if kind == "sum" else max(values)
        return [[[pair[0]]], [[pair[1]]]], question, str(answer)

    def _between(self, first: int, rng: random.Random) -> tuple[list[dict], str, str]:
        """Pictures between words: two or three digits to add."""
        several = [first, *self._draw(rng, rng.randint(1, 2))]
        parts = [image_part(self._image([[k]], rng)) for k in several]
        for place in range(len(parts) - 1, 0, -1):
            parts.insert(place, text_part(" plus "))
        return parts, "plus", str(sum(self.labels[k] for k in several))

    def _words(self, first: int, rng: random.Random) -> tuple[list[dict], str, str]:
        """The question without its pictures: the digits in words before it."""
        kind = rng.choice(("which", "sum", "larger", "row"))
        layouts, question, answer = self._compose(kind, first, rng)
        digits = " ".join(str(self.labels[k]) for rows in layouts for row in rows for k in row)
        return [text_part(f"{digits} {question}")], question, answer

    def _compose_count(self, first: int, question: str, rng: random.Random):
        four = [first, *self._draw(rng, 3)]
        # One of the other three repeats the first digit half of the time: else 1 is always right.
        twins = [k for k in self._draw(rng, 24) if self.labels[k] == self.labels[first]]
        if twins:
            four[1] = twins[0]
        rng.shuffle(four)
        wanted = self.labels[first] if rng.random() < 0.8 else rng.randrange(10)
        layout = [four] if rng.random() < 0.5 else [four[:2], four[2:]]
        answer = sum(self.labels[k] == wanted for k in four)
        return [layout], question.format(d=wanted), str(answer)

    def _draw(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(len(self.scans)) for _ in range(count)]

    def _image(self, layout: list[list[int]], rng: random.Random) -> ImageRef:
        scans = [[self.scans[k] for k in row] for row in layout]
        seed = rng.getrandbits(64) if self.split == "train" else None
        return ImageRef(
            name=f"digits/{self.split}",
            open=partial(draw, scans, self.cell, seed),
            size=(self.cell * len(layout[0]), self.cell * len(layout)),
        )


def draw(scans: list[list[Image.Image]], cell: int, seed: int | None) -> Image.Image:
    """A grid of digits, each distorted by its own draw where a seed is given."""
    rng = random.Random(seed) if seed is not None else None
    if len(scans) == 1 and len(scans[0]) == 1:
        canvas = draw_digit(scans[0][0], cell, rng)
    else:
        canvas = Image.new("L", (cell * len(scans[0]), cell * len(scans)))
        for y, row in enumerate(scans):
            for x, scan in enumerate(row):
                canvas.paste(draw_digit(scan, cell, rng), (x * cell, y * cell))
    if rng is None:
        return canvas
    return shade(canvas, rng)


def draw_digit(scan: Image.Image, cell: int, rng: random.Random | None) -> Image.Image:
    """The 8 x 8 scan up-scaled into a cell; with rng: turned, stretched and shifted a little."""
    turn, size_x, size_y, shift_x, shift_y = 0.0, 0.85, 0.85, 0.0, 0.0
    if rng is not None:
        turn = rng.uniform(-0.2, 0.2)
        size_x, size_y = size_x * rng.uniform(0.88, 1.12), size_y * rng.uniform(0.88, 1.12)
        shift_x, shift_y = rng.uniform(-0.06, 0.06) * cell, rng.uniform(-0.06, 0.06) * cell
    # PIL wants the map from output pixels to the scan's.
    scale_x, scale_y = 8 / (cell * size_x), 8 / (cell * size_y)
    cos, sin = math.cos(turn), math.sin(turn)
    a, b, d, e = cos * scale_x, sin * scale_x, -sin * scale_y, cos * scale_y
    middle_x, middle_y = cell / 2 + shift_x, cell / 2 + shift_y
    affine = (a, b, 4 - a * middle_x - b * middle_y, d, e, 4 - d * middle_x - e * middle_y)
    return scan.transform(
        (cell, cell), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC, fillcolor=0
    )


def shade(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Another brightness and some noise over the whole picture."""
    values = np.asarray(canvas, dtype=np.float32) * np.float32(rng.uniform(0.75, 1.1))
    noise = noise_bank()
    start = rng.randrange(noise.size - values.size)
    values += noise[start : start + values.size].reshape(values.shape) * rng.uniform(0, 12)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


@lru_cache(maxsize=1)
def noise_bank() -> np.ndarray:
    """Normal noise drawn once; a sample takes a slice of it, far cheaper than drawing its own."""
    return np.random.Generator(np.random.PCG64(8)).standard_normal(1 << 20, dtype=np.float32)


@lru_cache(maxsize=1)
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [1797, 8, 8], labels [1797])."""
    from sklearn.datasets import load_digits  # costs a second, and only the demo needs it

    digits = load_digits()
    pixels = np.clip(digits.images * (255 / 16), 0, 255).round().astype(np.uint8)
    return pixels, digits.target
