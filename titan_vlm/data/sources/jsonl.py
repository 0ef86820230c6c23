"""JSONL in LLaVA or OpenAI form (messages.py says which is which)."""

import os

from titan_vlm.data.sample import RawSample
from titan_vlm.data.sources.files import Concatenated, JsonlFile, find_files
from titan_vlm.data.sources.messages import expect, from_llava, from_openai
from titan_vlm.errors import DataError


class JsonlSource:
    """One record per line; relative image paths start at image_root or beside the file."""

    def __init__(self, path: str, form: str, image_root: str = ""):
        files = find_files(path, (".jsonl", ".json"), form)
        self.index = Concatenated([JsonlFile(file) for file in files])
        self.form, self.image_root = form, image_root

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> RawSample:
        file, number = self.index.locate(index % len(self))
        record, origin = file.record(number), file.origin(number)
        root = self.image_root or os.path.dirname(file.path)
        try:
            if self.form == "llava":
                messages = from_llava(record, root)
            else:
                messages = from_openai(expect(record, "messages", list, "the record"), root)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        return RawSample(str(record.get("id", origin)), messages, origin)
