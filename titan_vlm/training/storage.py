"""Where checkpoints lie: a folder of a file system, or of an object store through fsspec.

                     local                                   remote (s3://, gs://, memory://, ...)
    written as       step-000100.tmp                         step-000100
    committed by     a rename to step-000100, after every    its manifest.json, the last object
                     byte and the folder are on the disk     that is written
    set aside as     step-000100.damaged                     the same, object by object

An object store cannot rename a folder, but shows an object only when it is whole. On both, a
checkpoint without a manifest is none. Nothing but folders of these names is ever removed.

DCP reads and writes through the same class, which takes the checksum of a file while it is written:
nothing is read a second time.
"""

import hashlib
import io
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import torch.distributed.checkpoint as dcp
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from titan_vlm.errors import ConfigError

FOLDER = re.compile(r"step-(\d{6,})")
_LEFT = re.compile(FOLDER.pattern + r"\.(tmp|old)")


class Storage(FileSystemBase):
    """The files of one folder of checkpoints. Paths are texts below `root`.

    `written` has size and SHA-256 of every file written through `create_stream` so far, `failure`
    what went wrong in writing one: PyTorch's own writer would call it "unexpected pos".

    Raises:
        ConfigError: the address names a protocol that no installed package serves.
    """

    def __init__(self, directory: str | Path):
        try:
            self.fs, self.root = fsspec.core.url_to_fs(str(directory))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"checkpoint.directory = {directory}: {error}") from error
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.written: dict[str, dict[str, Any]] = {}
        self.failure: Exception | None = None

    def path(self, *names: str) -> str:
        return "/".join([self.root, *names])

    def names(self, *below: str) -> list[str]:
        """What lies in a folder; nothing where there is none."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(*below), detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def read(self, *names: str) -> bytes:
        return self.fs.cat_file(self.path(*names))

    def size(self, *names: str) -> int:
        return self.fs.size(self.path(*names))

    def sha256(self, *names: str) -> str:
        digest = hashlib.sha256()
        with self.fs.open(self.path(*names), "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def temporary(self, name: str) -> str:
        """The folder in which `name` is written, empty now."""
        temporary = name + ".tmp" if self.is_local else name
        self.clear()
        self.remove(temporary)
        return temporary

    def commit(self, temporary: str, name: str, manifest: bytes) -> None:
        """Make the files in `temporary` the checkpoint `name`, all of them or none."""
        with self.create_stream(self.path(temporary, "manifest.json"), "wb") as stream:
            stream.write(manifest)
            if self.is_local:
                stream.flush()
                os.fsync(stream.fileno())
        if not self.is_local:
            return
        _sync_folder(self.path(temporary))
        if os.path.lexists(self.path(name)):  # of a run that this one has gone back behind
            shutil.rmtree(self.path(name + ".old"), ignore_errors=True)
            os.rename(self.path(name), self.path(name + ".old"))
        os.rename(self.path(temporary), self.path(name))
        _sync_folder(self.root)
        shutil.rmtree(self.path(name + ".old"), ignore_errors=True)

    def remove(self, name: str) -> None:
        """A reader sees all of it or nothing."""
        if not self.is_local:
            if self.fs.exists(self.path(name, "manifest.json")):
                self.fs.rm_file(self.path(name, "manifest.json"))
            if self.fs.exists(self.path(name)):
                self.fs.rm(self.path(name), recursive=True)
        elif os.path.lexists(self.path(name)):
            doomed = self.path(name)
            if not name.endswith((".old", ".tmp")):
                doomed += ".old"
                shutil.rmtree(doomed, ignore_errors=True)
                os.rename(self.path(name), doomed)
            shutil.rmtree(doomed)

    def prepare(self) -> None:
        """Make the folder, if need be, and clear it.

        Raises:
            OSError: it cannot be written.
        """
        self.fs.makedirs(self.root, exist_ok=True)
        if self.is_local and not os.access(self.root, os.W_OK):
            raise PermissionError(f"{self.root} may not be written")
        self.clear()

    def leave_token(self) -> str:
        """An empty file of a name that nobody has asked for before; returns the name."""
        name = f".seen-{uuid.uuid4().hex}"
        self.fs.pipe_file(self.path(name), b"")
        return name

    def see(self, token: str) -> None:
        """Raises where `token` is not there, or cannot be asked for."""
        self.fs.invalidate_cache()
        self.fs.info(self.path(token))

    def clear(self) -> None:
        """Remove what a killed process was writing or removing, or a save that failed."""
        for name in self.names():
            if self.is_local and _LEFT.fullmatch(name):
                shutil.rmtree(self.path(name), ignore_errors=True)
                continue
            is_ours = not self.is_local and FOLDER.fullmatch(name)
            if is_ours and "manifest.json" not in self.names(name):
                self.remove(name)

    def set_aside(self, name: str, why: str) -> str:
        """Keep `name` where nobody takes it for a checkpoint; returns its new name."""
        taken, number = set(self.names()), 1
        aside = f"{name}.{why}"
        while aside in taken:
            number += 1
            aside = f"{name}.{why}{number}"
        if self.is_local:
            os.rename(self.path(name), self.path(aside))
            return aside
        # Removed once it is copied whole; file by file, for stores have no folders to copy.
        files = self.names(name)
        self.fs.copy([self.path(name, f) for f in files], [self.path(aside, f) for f in files])
        self.remove(name)
        return aside

    def writer(self, folder: str) -> dcp.StorageWriter:
        # DCP would take a store without file descriptors for a reason to sync all disks.
        return _Writer(self, self.path(folder))

    def reader(self, folder: str) -> dcp.StorageReader:
        return _Reader(self, self.path(folder))

    # What DCP asks of a file system.

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        path = os.fspath(path)
        # Plain files: fsspec's local ones hide from DCP that they can be synced.
        with open(path, mode) if self.is_local else self.fs.open(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            counted = _Counted(stream)
            try:
                yield counted
            finally:
                self.failure = self.failure or counted.failure
            self.written[path.rsplit("/", 1)[-1]] = counted.summary()

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: str | os.PathLike) -> str:
        return os.fspath(path)

    def mkdir(self, path: str | os.PathLike) -> None:
        self.fs.makedirs(os.fspath(path), exist_ok=True)

    def exists(self, path: str | os.PathLike) -> bool:
        return self.fs.exists(os.fspath(path))

    def rm_file(self, path: str | os.PathLike) -> None:
        self.fs.rm_file(os.fspath(path))

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        old, new = os.fspath(path), os.fspath(new_path)
        os.rename(old, new) if self.is_local else self.fs.mv(old, new)
        self.written[new.rsplit("/", 1)[-1]] = self.written.pop(old.rsplit("/", 1)[-1])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class _Counted(io.IOBase):
    """A stream for writing that counts and hashes what goes through it."""

    def __init__(self, stream: io.IOBase):
        self.stream, self.bytes, self.digest = stream, 0, hashlib.sha256()
        self.failure: Exception | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.bytes += memoryview(data).nbytes
        try:
            self.stream.write(data)
        except Exception as error:
            self.failure = error
            raise
        return memoryview(data).nbytes

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        if not self.stream.closed:
            self.stream.flush()

    def fileno(self) -> int:
        self.stream.flush()  # DCP syncs its metadata without
        return self.stream.fileno()

    def close(self) -> None:  # DCP closes early; the stream is its opener's to close
        self.flush()

    def summary(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self.digest.hexdigest()}


class _Writer(dcp.FileSystemWriter):
    def __init__(self, storage: Storage, path: str):
        super().__init__(path, sync_files=storage.is_local)
        self.fs, self.path = storage, path


class _Reader(dcp.FileSystemReader):
    def __init__(self, storage: Storage, path: str):
        super().__init__(path)
        self.fs, self.path = storage, path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(), "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """DCP pickles its metadata. Nothing but its own data classes is made from the file."""

    ALLOWED = {
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "bfloat16", "bool", "float16", "float32", "float64"}
        | {"int16", "int32", "int64", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
