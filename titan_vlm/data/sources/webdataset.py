"""WebDataset tar shards: consecutive members of one name are one sample.

    000000003.jpg, 000000003.txt, 000000003.json    picture, caption, facts

One pass over the members' headers when opened notes where picture and caption lie; both are read
from there at random later. So shards must be plain tar, not compressed. What lies behind a damaged
header or a hole cannot be found: it counts as one bad sample at the end of its shard.
"""

import json
import os
from array import array
from functools import partial

from titan_vlm.data.limits import DEFAULT, Limits
from titan_vlm.data.sample import ImageRef, RawSample, image_part, open_slice, text_part
from titan_vlm.data.sources.files import Concatenated, find_files, read_slice
from titan_vlm.data.sources.tar import BLOCK, Member, members
from titan_vlm.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")  # the first that is there
CAPTION_KEYS = ("caption", "text")


class TarShard:
    """Where the samples of one shard lie: four numbers and a flag each."""

    def __init__(self, path: str, limits: Limits = DEFAULT):
        self.path, self.limits = path, limits
        # Per sample: offset and length of the picture, of the caption, and of the name.
        self.spans = array("Q")
        self.is_json = array("b")
        self.damage = ""
        found, current = {}, None
        try:
            for member in members(path):
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                suffix = suffix.lower()
                if (folder, stem) != current:
                    self._add(found)
                    found, current = {}, (folder, stem)
                if not found or suffix in PICTURES + CAPTIONS:
                    found[suffix] = member
        except DataError as error:
            if not found:
                raise DataError(f"{path}: not a plain tar file: {error}") from error
            self.damage = f"{error}; what follows is lost"
        self._add(found)
        if self.damage:
            self.spans.extend((0,) * 5)
            self.is_json.append(False)

    def _add(self, found: dict[str, Member]) -> None:
        if not found:
            return
        picture = next((found[s] for s in PICTURES if s in found), None)
        suffix = next((s for s in CAPTIONS if s in found), None)
        caption = found[suffix] if suffix else None
        for member in (picture, caption):
            self.spans.extend((member.offset, member.size) if member else (0, 0))
        # The name is in the header block before the data: read again only when it is wanted.
        self.spans.append(next(iter(found.values())).offset - BLOCK)
        self.is_json.append(suffix == "json")

    def __len__(self) -> int:
        return len(self.is_json)

    def key(self, index: int) -> str:
        header = read_slice(self.path, self.spans[5 * index + 4], 100)
        name = header.split(b"\0")[0].decode(errors="replace")
        folder, slash, file = name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    def origin(self, index: int) -> str:
        return f"{self.path}:{self.key(index)}"

    def check(self, index: int) -> None:
        """Refuses what stands for the damaged end."""
        if self.damage and index == len(self) - 1:
            raise DataError(f"{self.path}: {self.damage}")

    def picture(self, index: int) -> ImageRef:
        offset, length = self.spans[5 * index : 5 * index + 2]
        if not offset:
            raise DataError(f"no picture ({', '.join(PICTURES)})")
        open = partial(open_slice, self.path, offset, length, self.limits)
        return ImageRef(self.origin(index), open)

    def caption(self, index: int) -> str:
        offset, length = self.spans[5 * index + 2 : 5 * index + 4]
        if not offset:
            raise DataError(f"no caption ({', '.join(CAPTIONS)})")
        self.limits.check_bytes(length, "a caption")
        data = read_slice(self.path, offset, length)
        try:
            text = data.decode()
            record = json.loads(text) if self.is_json[index] else {"text": text}
        except (ValueError, RecursionError) as error:
            raise DataError(f"malformed caption: {error}") from error
        found = record if isinstance(record, dict) else {}
        text = next((found[key] for key in CAPTION_KEYS if isinstance(found.get(key), str)), None)
        if text is None:
            raise DataError(f"caption: expected a text under {' or '.join(CAPTION_KEYS)}")
        self.limits.check_chars(len(text))
        return text.strip()


class WebDatasetSource:
    """Pictures with captions: the prompt asks, the caption answers."""

    def __init__(self, path: str, prompt: str, limits: Limits = DEFAULT):
        files = find_files(path, (".tar",), "webdataset")
        self.index = Concatenated([TarShard(file, limits) for file in files])
        self.prompt = prompt

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> RawSample:
        shard, number = self.index.locate(index % len(self))
        shard.check(number)
        origin = shard.origin(number)
        try:
            picture, caption = shard.picture(number), shard.caption(number)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        return caption_sample(
            f"{os.path.basename(origin)}", origin, [picture], self.prompt, caption
        )


def caption_sample(
    id: str, origin: str, pictures: list[ImageRef], prompt: str, caption: str
) -> RawSample:
    """Pictures and a caption as a conversation."""
    return RawSample(
        id,
        [
            {"role": "user", "content": [*map(image_part, pictures), text_part(prompt)]},
            {"role": "assistant", "content": [text_part(caption)]},
        ],
        origin,
        {"answer": caption},
    )
