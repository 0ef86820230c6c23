"""Directories of safetensors files, read and written one tensor at a time.

    model.safetensors                                   a single file, or
    model.safetensors.index.json                        {"weight_map": {tensor name: file name}}
    model-00001-of-00002.safetensors  ...               its shards

Reading opens a file for one tensor (or some rows of it) and closes it again, so that no more than
that tensor is ever mapped. Writing knows every shape in advance: the header of a shard is written
first, then each tensor as it is produced. Neither holds a second copy of the model.
"""

import json
import reprlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan_vlm.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_NAME_BYTES = 255
MAX_INDEX_BYTES = 100_000_000  # as the format allows a file's header
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says about a tensor."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor, or a range of its first dimension; only that is read.

        It may be a view of the mapped file: copy it, and let it go.
        """
        with _open(self.file) as file:
            if not self.shape:  # a number has no slices
                return file.get_tensor(self.name)
            part = file.get_slice(self.name)
            return part[:] if rows is None else part[rows]


def read_headers(directory: str | Path) -> dict[str, TensorInfo]:
    """Every tensor in a directory, by name. Reads no tensor.

    Raises:
        ConfigError: no such directory, a missing or damaged file; names the file.
    """
    infos: dict[str, TensorInfo] = {}
    for path, expected in _files(Path(directory)).items():
        with _open(path) as file:
            names = list(file.keys())
            absent = expected - set(names)
            if absent:
                raise ConfigError(f"{path} lacks {min(absent)}, which {INDEX} says it holds")
            for name in names:
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ConfigError(
                        f"{path}: {name} has type {part.get_dtype()}; expected one of "
                        f"{', '.join(_DTYPES)} (a quantised checkpoint cannot be trained from)"
                    )
                infos[name] = TensorInfo(path, name, tuple(part.get_shape()), dtype)
    return infos


def _files(directory: Path) -> dict[Path, set[str]]:
    """The files to read, each with the names that an index expects in it."""
    index = directory / INDEX
    if index.is_file():
        files: dict[Path, set[str]] = {}
        for name, file in _weight_map(index).items():
            files.setdefault(directory / file, set()).add(name)
        return files
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: set()}
    raise ConfigError(f"{directory} holds neither {SINGLE} nor {INDEX}")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name; only files beside the index are ever opened."""
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"larger than {MAX_INDEX_BYTES} bytes")
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if not isinstance(weight_map, dict):
            raise TypeError(f"weight_map is a {type(weight_map).__name__}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index} is damaged: {error!r}") from error
    for file in weight_map.values():
        if not isinstance(file, str) or not _is_file_name(file):
            raise ConfigError(f"{index} names {reprlib.repr(file)}, which is no file beside it")
    return weight_map


def _is_file_name(text: str) -> bool:
    """One that no folder is part of, and that a file can have."""
    odd = not text.isprintable() or set(text) & set("/\\") or text in ("", ".", "..")
    return not odd and len(text.encode()) <= MAX_NAME_BYTES


def _open(path: Path):
    if not path.is_file():  # a pipe could be read for ever
        raise ConfigError(f"{path} is missing, which {INDEX} names")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged or truncated: {error}") from error


@contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `directory` once it was filled without an error.

    An older model directory of that name is replaced, anything else is left alone.

    Raises:
        ConfigError: `directory` is something else than a Hugging Face model directory.
    """
    final = Path(directory).resolve()  # "." has no name to put ".tmp" behind
    if final.exists() and not (final / "config.json").is_file() and not _is_empty(final):
        raise ConfigError(f"{final} exists and holds no Hugging Face model; choose another name")
    temporary, old = (final.with_name(final.name + end) for end in (".tmp", ".old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def write_shards(
    directory: Path,
    specs: Mapping[str, TensorSpec],
    produce: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> None:
    """Write the tensors of `specs` in order, and the index if there is more than one file.

    Args:
        produce: gives a tensor of the promised shape, any dtype, any device; called once for each.
        max_shard_bytes: a file gets no further tensor that would exceed this.
    """
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = several if len(shards) > 1 else SINGLE
        _write_file(directory / file, {name: specs[name] for name in names}, produce)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(spec.num_bytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, specs: dict[str, TensorSpec], produce: Callable[[str], Tensor]) -> None:
    """The format: 8 bytes of header length, the header as JSON, then the tensors' bytes."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.num_bytes
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data, and each tensor of one type, is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            file.write(_bytes(produce(name), spec))  # no name: the tensor is gone before the next


def _bytes(tensor: Tensor, spec: TensorSpec) -> memoryview:
    assert tuple(tensor.shape) == spec.shape, (tensor.shape, spec.shape)
    flat = tensor.to("cpu", spec.dtype).contiguous().flatten()
    return flat.view(torch.uint8).numpy().data
