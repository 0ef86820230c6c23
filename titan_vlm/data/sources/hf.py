"""Hugging Face datasets, from a `save_to_disk` directory or the hub (needs the package datasets).

With data.messages_column: conversations in OpenAI form, whose image parts take the pictures of
data.image_column in order. Without: data.caption_prompt asks and data.text_column answers.
"""

import os
import re
from functools import partial

from titan_vlm.data.limits import limits
from titan_vlm.data.reading import patiently
from titan_vlm.data.sample import (
    ImageRef,
    RawSample,
    open_bytes,
    open_file,
    raise_machine_trouble,
)
from titan_vlm.data.sources.messages import from_openai, shown
from titan_vlm.data.sources.webdataset import caption_sample
from titan_vlm.errors import ConfigError, DataError

# What the hub's client raises where a name, a split or the network is not there.
HUB_ERRORS = (OSError, ValueError)


class HfSource:
    def __init__(self, data, path: str, split: str):
        self.path, self.data, self.limits = path, data, limits(data)
        self.rows = open_dataset(path, split)
        answers = data.messages_column or data.text_column
        names = self.rows.column_names
        if answers not in names:
            key = "messages_column" if data.messages_column else "text_column"
            raise ConfigError(f'data.{key} = "{answers}": {path} has {", ".join(names)}')
        self.has_images = data.image_column in names
        if not self.has_images and not data.messages_column:
            raise ConfigError(
                f'data.image_column = "{data.image_column}": {path} has {", ".join(names)}'
            )
        if self.has_images:
            self.rows = undecoded(self.rows, data.image_column)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> RawSample:
        number = index % len(self)
        origin = f"{self.path}:{number}"
        try:
            row = self._row(number)
            pictures = self._pictures(row, origin) if self.has_images else []
            if not self.data.messages_column:
                if not pictures:
                    raise DataError(f"{self.data.image_column}: no picture to describe")
                text = row[self.data.text_column]
                if not isinstance(text, str):
                    raise DataError(f"{self.data.text_column}: expected a text, got {shown(text)}")
                self.limits.check_chars(len(text))
                return caption_sample(origin, origin, pictures, self.data.caption_prompt, text)
            messages = self._messages(row[self.data.messages_column], pictures)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        return RawSample(origin, messages, origin)

    def _row(self, number: int) -> dict:
        try:
            return patiently(lambda: self.rows[number], self.path)
        except (OSError, ValueError) as error:  # Arrow's errors are of these kinds, too
            raise_machine_trouble(error)
            raise DataError(f"unreadable row: {error}") from error

    def _messages(self, messages: object, pictures: list[ImageRef]) -> list[dict]:
        if not isinstance(messages, list):
            raise DataError(f"{self.data.messages_column}: expected a list of messages")
        waiting = iter(pictures)
        placed = 0

        def attached() -> ImageRef:
            nonlocal placed
            placed += 1
            picture = next(waiting, None)
            if picture is None:
                raise DataError(
                    f"image-token mismatch: image part {placed} of {len(pictures)} image(s)"
                )
            return picture

        converted = from_openai(messages, self.root(), attached, self.limits)
        if placed != len(pictures):
            raise DataError(
                f"image-token mismatch: {placed} image part(s) for {len(pictures)} image(s)"
            )
        return converted

    def _pictures(self, row: dict, origin: str) -> list[ImageRef]:
        value = row[self.data.image_column]
        cells = value if isinstance(value, list) else [value] if value is not None else []
        self.limits.check_parts(len(cells))
        return [self._picture(cell, origin) for cell in cells]

    def _picture(self, cell: object, origin: str) -> ImageRef:
        if isinstance(cell, str):
            cell = {"path": cell}
        if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes) and cell["bytes"]:
            return ImageRef(origin, partial(open_bytes, cell["bytes"], self.limits))
        if isinstance(cell, dict) and isinstance(cell.get("path"), str) and cell["path"]:
            path = os.path.join(self.root(), cell["path"])
            self.limits.check_place(path, self.root())
            return ImageRef(path, partial(open_file, path, self.limits))
        raise DataError(f"{self.data.image_column}: expected an image, got {shown(cell)}")

    def root(self) -> str:
        """Where pictures that rows name by path may lie: what comes from the hub is unpacked in
        the cache of datasets."""
        if self.data.image_root or os.path.isdir(self.path):
            return self.data.image_root or self.path
        return str(import_datasets().config.HF_CACHE_HOME)


def open_dataset(path: str, split: str):
    """A Dataset from disk (its split, where it has several) or from the hub."""
    datasets = import_datasets()
    if not path:
        raise ConfigError('data.path: the source "hf" needs a directory or a hub name')
    if os.path.isdir(path):
        found = open_directory(path)
        if not isinstance(found, datasets.DatasetDict):
            return found
        if split not in found:
            raise ConfigError(f'data.split = "{split}": {path} has {", ".join(found)}')
        return found[split]
    try:
        return datasets.load_dataset(path, split=split)
    except HUB_ERRORS as error:
        raise ConfigError(
            f'data.path: {path} is no directory, and the hub gives no "{split}" of it: {error}'
        ) from error


def has_split(path: str, split: str) -> bool:
    """Whether the dataset has this split; a plain Dataset from disk has none beside itself."""
    datasets = import_datasets()
    if os.path.isdir(path):
        found = open_directory(path)
        return isinstance(found, datasets.DatasetDict) and split in found
    # The hub also takes a part of a split, train[95%:], or a sum of several.
    names = set(re.sub(r"\[[^]]*\]", "", split).split("+"))
    try:
        return names <= set(datasets.get_dataset_split_names(path))
    except HUB_ERRORS as error:
        raise ConfigError(
            f"data.path: {path} is no directory, and the hub does not tell its splits: {error}"
        ) from error


def open_directory(path: str):
    """What save_to_disk wrote: a Dataset or a DatasetDict."""
    try:
        return import_datasets().load_from_disk(path)
    except FileNotFoundError as error:
        raise ConfigError(f"data.path: {path} was not written by save_to_disk: {error}") from error


def import_datasets():
    """The optional package."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            'data.source = "hf" needs the package datasets (pip install datasets)'
        ) from error
    return datasets


def undecoded(rows, column: str):
    """The dataset with images as bytes or paths: decoding is ours to do, and later."""
    import datasets

    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return rows.cast_column(column, type(feature)(datasets.Image(decode=False)))
    return rows
