"""JSONL in LLaVA or OpenAI form (messages.py says which is which)."""

import os

from titan_vlm.data.limits import DEFAULT, Limits
from titan_vlm.data.sample import RawSample
from titan_vlm.data.sources.files import Concatenated, JsonlFile, find_files
from titan_vlm.data.sources.messages import expect, from_llava, from_openai
from titan_vlm.errors import DataError

MAX_ID = 1000  # characters of a record's own id that rows carry along


class JsonlSource:
    """One record per line; relative image paths start at image_root or beside the file."""

    def __init__(self, path: str, form: str, image_root: str = "", limits: Limits = DEFAULT):
        files = find_files(path, (".jsonl", ".json"), form)
        self.index = Concatenated([JsonlFile(file, limits) for file in files])
        self.form, self.image_root, self.limits = form, image_root, limits

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> RawSample:
        file, number = self.index.locate(index % len(self))
        record, origin = file.record(number), file.origin(number)
        root = self.image_root or os.path.dirname(file.path)
        try:
            if self.form == "llava":
                messages = from_llava(record, root, self.limits)
            else:
                turns = expect(record, "messages", list, "the record")
                messages = from_openai(turns, root, limits=self.limits)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        return RawSample(own_id(record, origin), messages, origin)


def own_id(record: dict, origin: str) -> str:
    """The record's id where that is a name or number, else where it stands."""
    own = record.get("id")
    return str(own) if isinstance(own, str | int) and len(str(own)) <= MAX_ID else origin
