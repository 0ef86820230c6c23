"""From a conversation to tokens, targets, positions and pictures.

    text       <|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>Which?<|im_end|>\\n
               <|im_start|>assistant\\n7<|im_end|>\\n
    tokens     the same, with the placeholder's id repeated once per visual token
    labels     only "7" and its <|im_end|>: what the assistant writes, and that it stops

Which characters the assistant wrote is found by rendering the conversation turn by turn: the text
up to an assistant turn (with the generation prompt) must begin the text that includes it, and what
comes after is the turn. A template that rewrites earlier turns is refused rather than mistrained.

Positions are M-RoPE's (time, height, width): text counts up by one in all three, a picture spans
its grid from where the text stands, and text goes on after its longer side; every pair of video
frames is a picture of its own. A model with positions = "1d" counts visual tokens as text.

Shapes: `L` tokens of one sample.
"""

import re
from dataclasses import dataclass, field

import numpy as np
from jinja2 import TemplateError

from titan_vlm.data.images import VisualSpec, image_grid, prepare_image
from titan_vlm.data.sample import ImageRef, RawSample, VideoRef
from titan_vlm.data.tokenizer import (
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    visual_token_ids,
)
from titan_vlm.data.videos import VideoPlan, plan_video, prepare_video, video_text
from titan_vlm.errors import DataError
from titan_vlm.models.inputs import IGNORE_LABEL

# "<|vision_start|><1234.5 seconds><|vision_start|>", a token for each character.
_LONGEST_OPENING = 24


@dataclass
class Visual:
    """One picture or video of a sample; its tokens lie within [start, end) of the tokens."""

    ref: ImageRef | VideoRef
    grid: tuple[int, int, int]
    start: int = 0
    end: int = 0
    # The same with the markers around it, and the time before a video.
    opening: int = 0
    closing: int = 0
    plan: VideoPlan | None = None

    def pixels(self, spec: VisualSpec) -> np.ndarray:
        """float32 [N, C], decoded now; a broken file is a DataError that names it."""
        if self.plan is not None:
            return prepare_video(self.ref, self.plan, spec)
        return prepare_image(self.ref.load_rgb(), self.grid, spec)


@dataclass
class Sample:
    """One encoded conversation, pixels not yet decoded."""

    id: str
    origin: str
    tokens_L: np.ndarray
    labels_L: np.ndarray
    positions_3L: np.ndarray
    visual_L: np.ndarray  # bool: which tokens stand for pixels
    visuals: list[Visual]
    meta: dict = field(default_factory=dict)
    source: int = 0  # which of the sources that are mixed

    def __len__(self) -> int:
        return len(self.tokens_L)


class Encoder:
    """A tokenizer with its chat template, and how pictures become tokens."""

    def __init__(self, tokenizer, spec: VisualSpec):
        self.tokenizer, self.spec = tokenizer, spec
        self.ids = visual_token_ids(tokenizer)
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = tokenizer.eos_token_id

    def encode(self, raw: RawSample) -> Sample:
        """Tokens with targets on the assistant's turns; DataError names the sample's origin."""
        try:
            check_turns(raw.messages)
            visuals = self._visuals(raw.messages)
            text, spans = self._render_turns(for_template(raw.messages), visuals)
            sample = self._tokenize(raw, text, spans, visuals)
        except DataError as error:
            raise DataError(f"{raw.origin}: {error}") from error
        if not (sample.labels_L != IGNORE_LABEL).any():
            raise DataError(f"{raw.origin}: no assistant text to learn from")
        return sample

    def encode_prompt(self, messages: list[dict], id: str = "", origin: str = "prompt") -> Sample:
        """Tokens for generation: ends where the assistant is to begin; no targets."""
        raw = RawSample(id, messages, origin)
        try:
            visuals = self._visuals(messages)
            text = self._render(for_template(messages), visuals, generation=True)
            return self._tokenize(raw, text, [], visuals)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error

    def _visuals(self, messages: list[dict]) -> list[Visual]:
        """Pictures in order of appearance, with their grids (headers only)."""
        visuals = []
        for message in messages:
            parts = message["content"]
            for part in parts if isinstance(parts, list) else []:
                if part["type"] == "image":
                    visuals.append(self._plan_image(part["image"]))
                elif part["type"] == "video":
                    plan = plan_video(part["video"], self.spec)
                    visuals.append(Visual(part["video"], plan.grid, plan=plan))
        return visuals

    def _plan_image(self, ref: ImageRef) -> Visual:
        width, height = ref.header_size()
        try:
            return Visual(ref, image_grid(width, height, self.spec))
        except DataError as error:
            raise DataError(f"{ref.name}: {error}") from error

    def _render_turns(self, messages, visuals) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and the character spans that the assistant wrote."""
        text = self._render(messages, visuals)
        spans = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:k], visuals, generation=True)
            last = k + 1 == len(messages)
            after = text if last else self._render(messages[: k + 1], visuals)
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"turn {k + 1}: the chat template does not extend its text turn by turn, so "
                    "the assistant's part cannot be found; use a template that keeps earlier turns"
                )
            # What follows the end-of-turn token (a line end) belongs to the template.
            spans.append((len(before), len(after.rstrip())))
        return text, spans

    def _render(self, messages, visuals: list[Visual], generation: bool = False) -> str:
        """The template's text; every video's placeholder is one per pair of frames."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error
        plans = [visual.plan for visual in visuals if visual.plan is not None]
        if not plans:
            return text
        if text.count(VIDEO_PAD) > len(plans):
            raise DataError(mismatch("videos", text.count(VIDEO_PAD), len(plans)))
        times = iter(plan.timestamps for plan in plans)
        return re.sub(
            re.escape(VIDEO_PAD),
            lambda _: video_text(next(times), VISION_START, VIDEO_PAD, VISION_END),
            text,
        )

    def _tokenize(self, raw: RawSample, text: str, spans, visuals: list[Visual]) -> Sample:
        try:
            encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:  # a lone surrogate, which JSON allows and Unicode does not
            raise DataError(f"text that is no Unicode: {error}") from error
        short = np.array(encoding.ids, dtype=np.int64)
        target = np.zeros(len(short), dtype=bool)
        if spans:
            starts = np.array([start for start, _ in encoding.offsets])
            for begin, end in spans:
                target |= (starts >= begin) & (starts < end)

        is_visual = (short == self.ids.image) | (short == self.ids.video)
        sizes = self._placeholder_grids(short, visuals)
        repeats = np.ones(len(short), dtype=np.int64)
        repeats[is_visual] = [h * w for h, w in sizes]
        ends = repeats.cumsum()

        tokens_L = short.repeat(repeats)
        visual_L = is_visual.repeat(repeats)
        surround = (tokens_L == self.ids.vision_start) | (tokens_L == self.ids.vision_end)
        written_L = target.repeat(repeats) & ~visual_L & ~surround
        labels_L = np.full(len(tokens_L), IGNORE_LABEL, dtype=np.int64)
        labels_L[:-1] = np.where(written_L[1:], tokens_L[1:], IGNORE_LABEL)

        holes = is_visual.nonzero()[0]
        starts = ends[holes] - repeats[holes]
        set_ranges(visuals, starts.tolist(), ends[holes].tolist())
        for visual in visuals:
            visual.opening, visual.closing = self._surround(tokens_L, visual)
        if self.spec.positions == "1d":
            starts, sizes = starts[:0], []
        positions_3L = rope_positions(len(tokens_L), starts.tolist(), sizes)
        return Sample(
            raw.id, raw.origin, tokens_L, labels_L, positions_3L, visual_L, visuals, raw.meta
        )

    def _surround(self, tokens_L: np.ndarray, visual: Visual) -> tuple[int, int]:
        """A picture's markers are next to it; around a video the template's stand outside of the
        time and of the markers of its pairs."""
        before = tokens_L[max(visual.start - _LONGEST_OPENING, 0) : visual.start]
        markers = (before == self.ids.vision_start).nonzero()[0]
        closed = (before == self.ids.vision_end).nonzero()[0]
        markers = markers[markers > closed.max(initial=-1)]
        opening = visual.start - (len(before) - int(markers[0]) if len(markers) else 0)
        behind = tokens_L[visual.end : visual.end + 2] == self.ids.vision_end
        return opening, visual.end + int(behind.cumprod().sum())

    def _placeholder_grids(self, ids, visuals: list[Visual]) -> list[tuple[int, int]]:
        """(height, width) in tokens of every placeholder, in order; their kinds must agree."""
        wanted, sizes = [], []
        for visual in visuals:
            merged = self.spec.frame_tokens(visual.grid)
            pad = self.ids.image if visual.plan is None else self.ids.video
            wanted += [pad] * visual.grid[0]
            sizes += [merged] * visual.grid[0]
        found = ids[(ids == self.ids.image) | (ids == self.ids.video)].tolist()
        if found != wanted:
            images = found.count(self.ids.image)
            given = sum(visual.plan is None for visual in visuals)
            raise DataError(mismatch("images", images, given))
        return sizes


def check_turns(messages: list[dict]) -> None:
    """Refuse what a template cannot render or a model cannot learn from."""
    if not messages:
        raise DataError("a conversation without messages")
    if messages[0]["role"] == "assistant":
        raise DataError("turn 1 is the assistant's: nothing was asked; begin with user or system")
    for k, message in enumerate(messages):
        if message["role"] == "assistant" and not text_of(message).strip():
            raise DataError(f"turn {k + 1}: the assistant says nothing")


def text_of(message: dict) -> str:
    """The text of a message, without its pictures."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def for_template(messages: list[dict]) -> list[dict]:
    """The messages without the pictures themselves: a template only places them."""
    return [
        {
            **message,
            "content": message["content"]
            if isinstance(message["content"], str)
            else [
                part if part["type"] == "text" else {"type": part["type"]}
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def mismatch(kind: str, placeholders: int, given: int) -> str:
    names = f"{IMAGE_PAD} and {VIDEO_PAD}"
    return (
        f"image-token mismatch: {placeholders} placeholder(s) for {given} {kind}; the template "
        f"must place each picture once, and texts must not contain {names}"
    )


def set_ranges(visuals: list[Visual], starts: list[int], ends: list[int]) -> None:
    """Which tokens each visual covers; a video reaches from its first to its last pair."""
    at = 0
    for visual in visuals:
        visual.start, visual.end = starts[at], ends[at + visual.grid[0] - 1]
        at += visual.grid[0]


def rope_positions(length: int, starts: list[int], sizes: list[tuple[int, int]]) -> np.ndarray:
    """int64 [3, L]; `starts` and `sizes` (height, width) of the blocks of visual tokens."""
    positions_3L = np.empty((3, length), dtype=np.int64)
    index = now = 0
    for start, (height, width) in zip(starts, sizes, strict=True):
        positions_3L[:, index:start] = np.arange(now, now + start - index)
        now += start - index
        block = slice(start, start + height * width)
        positions_3L[0, block] = now
        positions_3L[1, block] = now + np.arange(height).repeat(width)
        positions_3L[2, block] = now + np.tile(np.arange(width), height)
        now += max(height, width)
        index = start + height * width
    positions_3L[:, index:] = np.arange(now, now + length - index)
    return positions_3L
