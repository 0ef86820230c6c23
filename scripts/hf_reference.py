"""transformers' Qwen3-VL as a reference: the same weights, the same documents, every gradient.

Used by scripts/check_hf_parity.py and tests/parity. The reference runs one document at a time,
without packing, padding or masks, with its experts as a plain loop.

In float64 transformers still computes norms, rotary angles, position interpolation and the
router's softmax in float32, because it names that type in the code. `everything_float64` lifts all
of these at once: while it is active no operation is asked for float32.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from titan_vlm.errors import ConfigError
from titan_vlm.models.inputs import IGNORE_LABEL, Batch
from titan_vlm.models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig, to_hf
from titan_vlm.models.qwen3_vl.hf import links

Grid = tuple[int, int, int]


class _NoFloat32(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.float:
            function = Tensor.double
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


@contextmanager
def everything_float64() -> Iterator[None]:
    """Whoever asks for float32 in here gets float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _NoFloat32():
            yield
    finally:
        torch.set_default_dtype(before)


def tiny_config(moe: bool, tied: bool = False, **changed) -> Qwen3VLConfig:
    """Small, with every feature, and no two dimensions equal that a transposition could hide in."""
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": (1,),
    }
    text = TextConfig(
        **{
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "rope_theta": 10_000.0,
            "mrope_section": (4, 2, 2),
            "max_positions": 4096,
            **(experts if moe else {}),
            **changed,
        }
    )
    vision = VisionConfig(
        depth=3,
        hidden_size=32,
        intermediate_size=56,
        num_heads=2,
        out_hidden_size=text.hidden_size,
        num_positions=64,
        patch_size=4,
        deepstack_layers=(0, 1),
    )
    return Qwen3VLConfig(
        text,
        vision,
        tie_embeddings=tied,
        image_token_id=301,
        video_token_id=302,
        vision_start_token_id=303,
        vision_end_token_id=304,
    )


def new_reference(config: Qwen3VLConfig, seed: int = 0) -> nn.Module:
    """transformers' own model of these dimensions with random weights, none of them trivial."""
    import transformers

    hf = to_hf(config, "float32")
    dims = {k: hf[k] for k in hf if k not in ("architectures", "model_type", "dtype")}
    kind = hf["architectures"][0].removesuffix("ForConditionalGeneration")
    model = getattr(transformers, hf["architectures"][0])(
        getattr(transformers, f"{kind}Config")(**dims)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.float().parameters():
            noise = torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
            # Norms stay near one: with a mean of zero nothing would get through.
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model


def load_reference(directory: str | Path, dtype: torch.dtype) -> nn.Module:
    """The directory's model in transformers.

    Raises:
        ConfigError: a key is missing, unexpected or of another shape.
    """
    import transformers

    name = transformers.AutoConfig.from_pretrained(directory).architectures[0]
    with _casts_lifted(dtype):
        model, info = getattr(transformers, name).from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="sdpa",
            experts_implementation="eager",
            output_loading_info=True,
        )
        # Frequencies are in no file, and `from_pretrained` may have made them before the cast.
        for module in model.modules():
            if hasattr(module, "original_inv_freq"):
                axial = hasattr(module, "compute_axial_rope_parameters")
                kind = "axial" if axial else "default"
                make = getattr(module, f"compute_{kind}_rope_parameters")
                module.inv_freq, _ = make(module.config)
    problems = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if problems:
        raise ConfigError(f"transformers does not load {directory} cleanly: {problems}")
    return model.eval()


def _casts_lifted(dtype: torch.dtype):
    return everything_float64() if dtype == torch.float64 else nullcontext()


@dataclass
class Document:
    """One sample: tokens, targets (already shifted), its pictures in order of appearance."""

    tokens_S: Tensor
    labels_S: Tensor
    pixels_NC: Tensor
    grids: list[Grid]
    kinds: list[str]  # "image" or "video", for each grid


def make_document(
    config: Qwen3VLConfig, pictures: list[tuple[str, Grid, Tensor]], seed: int, text: int = 9
) -> Document:
    """Random words around pictures (kind, grid, patches) as Qwen3-VL writes them down.

    An image is `<start> pad ... pad <end>`; so is every frame of a video, between words that
    stand for its time. The first words of a document are no targets, like a prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    special = {
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    }
    words = torch.tensor([i for i in range(config.text.vocab_size) if i not in special])

    def some(count: int) -> list[int]:
        return words[torch.randint(len(words), (count,), generator=generator)].tolist()

    tokens = some(3)
    for kind, (t, h, w), _ in pictures:
        pad = config.image_token_id if kind == "image" else config.video_token_id
        for _frame in range(t):
            tokens += some(2) if kind == "video" else []
            tokens += [config.vision_start_token_id]
            tokens += [pad] * (h * w // config.vision.merge_size**2)
            tokens += [config.vision_end_token_id]
        tokens += some(4)
    tokens += some(text)
    labels = [*tokens[1:], IGNORE_LABEL]
    labels = [IGNORE_LABEL if x in special else x for x in labels]
    labels[:2] = [IGNORE_LABEL] * 2
    patches = [patches for _, _, patches in pictures]
    return Document(
        tokens_S=torch.tensor(tokens),
        labels_S=torch.tensor(labels),
        pixels_NC=torch.cat(patches) if patches else torch.empty(0, config.vision.patch_dim),
        grids=[grid for _, grid, _ in pictures],
        kinds=[kind for kind, _, _ in pictures],
    )


def random_picture(
    config: Qwen3VLConfig, kind: str, grid: Grid, seed: int
) -> tuple[str, Grid, Tensor]:
    """Patches as a processor would give them, of noise."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    return kind, grid, torch.rand(t * h * w, config.vision.patch_dim, generator=generator) * 2 - 1


@dataclass
class Answer:
    """What a model makes of documents: logits of each, loss and gradients of all."""

    logits: list[Tensor]  # [S, V] of each document
    loss: Tensor
    gradients: dict[str, Tensor]  # by Hugging Face name


def ask_reference(model: nn.Module, documents: list[Document]) -> Answer:
    """One forward pass per document; one backward pass of the mean loss over all targets."""
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    targets = _num_targets(documents)
    logits, loss = [], torch.zeros((), dtype=torch.float64)
    for document in documents:
        with _casts_lifted(dtype):
            out = model(use_cache=False, **_reference_inputs(model, document)).logits[0]
            part = F.cross_entropy(out, document.labels_S, reduction="sum") / targets
        part.backward()
        logits.append(out.detach())
        loss += part.detach()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return Answer(logits, loss, gradients)


def _num_targets(documents: list[Document]) -> int:
    return sum(int((d.labels_S != IGNORE_LABEL).sum()) for d in documents)


def positions(reference: nn.Module, document: Document) -> Tensor:
    """[3, S] as transformers computes them."""
    inputs = _reference_inputs(reference, document)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    return reference.model.get_rope_index(**{n: inputs.get(n) for n in names})[0][:, 0]


def _reference_inputs(model: nn.Module, document: Document) -> dict[str, Tensor]:
    config, tokens = model.config, document.tokens_S[None]
    kinds = (tokens == config.image_token_id).int() + 2 * (tokens == config.video_token_id).int()
    inputs = {"input_ids": tokens, "mm_token_type_ids": kinds}
    patches = document.pixels_NC.split([t * h * w for t, h, w in document.grids])
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        own = [i for i, k in enumerate(document.kinds) if k == kind]
        if own:
            inputs[pixels] = torch.cat([patches[i] for i in own])
            inputs[grid] = torch.tensor([document.grids[i] for i in own])
    return inputs


def pack(
    rows: list[list[Document]], length: int, config: Qwen3VLConfig, reference: nn.Module
) -> Batch:
    """Rows of documents, each filled up with padding to `length`."""
    documents = [d for row in rows for d in row]
    shape = (len(rows), length)
    tokens_BS = torch.zeros(shape, dtype=torch.long)
    labels_BS = torch.full(shape, IGNORE_LABEL)
    positions_3BS = torch.zeros((3, *shape), dtype=torch.long)
    valid_BS = torch.zeros(shape, dtype=torch.bool)
    doc_lens = []
    for b, row in enumerate(rows):
        start = 0
        for document in row:
            end = start + len(document.tokens_S)
            tokens_BS[b, start:end] = document.tokens_S
            labels_BS[b, start:end] = document.labels_S
            positions_3BS[:, b, start:end] = positions(reference, document)
            valid_BS[b, start:end] = True
            doc_lens.append(end - start)
            start = end
        assert start <= length, f"a row of {length} cannot hold {start} tokens"
        if start < length:
            doc_lens.append(length - start)
    visual = (tokens_BS == config.image_token_id) | (tokens_BS == config.video_token_id)
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        positions_3BS=positions_3BS,
        valid_BS=valid_BS,
        doc_lens=doc_lens,
        pixels_NC=torch.cat([d.pixels_NC for d in documents]),
        grids=[grid for d in documents for grid in d.grids],
        visual_index_M=(visual & valid_BS).flatten().nonzero().squeeze(-1),
    )


def ask_ours(model: nn.Module, batch: Batch) -> Answer:
    """The same of our model: one packed batch, gradients under transformers' names and shapes."""
    model.zero_grad()
    logits_TV = model(batch).flatten(0, 1)
    labels_T = batch.labels_BS.flatten()
    loss = F.cross_entropy(logits_TV, labels_T, reduction="sum") / batch.num_targets
    loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters()}
    valid_T = batch.valid_BS.flatten()
    ends = torch.tensor(batch.doc_lens).cumsum(0).tolist()
    logits = [
        logits_TV[end - size : end].detach()
        for size, end in zip(batch.doc_lens, ends, strict=True)
        if valid_T[end - 1]
    ]
    return Answer(logits, loss.detach().double(), to_reference_names(ours, model.config))


def to_reference_names(ours: dict[str, Tensor], config: Qwen3VLConfig) -> dict[str, Tensor]:
    """Our tensors as transformers' parameters: its names, fused as there, its expert layout."""
    parts: dict[str, list[Tensor]] = {}
    for link in links(config, dict.fromkeys(range(config.text.num_layers), "transformers")):
        tensor = ours[link.ours]
        tensor = torch.zeros(link.shape) if tensor is None else tensor
        parts.setdefault(link.theirs, []).append(link.to_theirs(tensor))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


@dataclass
class Errors:
    """Errors by name, each max|a - b| / max(max|b|, floor)."""

    logits: dict[str, float]
    loss: float
    gradients: dict[str, float]


def compare(ours: Answer, theirs: Answer, floor: float) -> Errors:
    """Measure `ours` against `theirs`."""
    if ours.gradients.keys() != theirs.gradients.keys():
        raise ValueError(f"parameters: {ours.gradients.keys() ^ theirs.gradients.keys()}")
    pairs = enumerate(zip(ours.logits, theirs.logits, strict=True))
    return Errors(
        logits={f"document {i}": error(a, b, floor) for i, (a, b) in pairs},
        loss=error(ours.loss, theirs.loss, floor),
        gradients={n: error(ours.gradients[n], b, floor) for n, b in theirs.gradients.items()},
    )


def error(a: Tensor, b: Tensor, floor: float) -> float:
    """The error measure of the numerics contract; infinite where a number is none."""
    if a.shape != b.shape:
        raise ValueError(f"shapes {list(a.shape)} and {list(b.shape)}")
    a, b = a.double(), b.double()
    value = float((a - b).abs().max() / b.abs().max().clamp(min=floor))
    return math.inf if math.isnan(value) else value
