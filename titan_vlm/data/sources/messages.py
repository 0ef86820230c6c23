"""The two conversation forms in circulation, turned into messages with references to pictures.

    LLaVA    {"image": "cat.jpg", "conversations": [
                 {"from": "human", "value": "<image>\\nWhat is this?"},
                 {"from": "gpt", "value": "A cat."}]}
    OpenAI   {"messages": [
                 {"role": "user", "content": [
                     {"type": "image_url", "image_url": {"url": "cat.jpg"}},
                     {"type": "text", "text": "What is this?"}]},
                 {"role": "assistant", "content": "A cat."}]}

Pictures may be paths (relative to a root, and within it), file:// URLs or base64 data URLs. Nothing
is fetched from a network unless data.allow_remote says so: a run should not depend on what a server
answers that day.
"""

import base64
import math
import os
import re
import reprlib
from collections.abc import Callable
from functools import partial
from urllib.parse import unquote, urlparse

from titan_vlm.data.limits import DEFAULT, Limits
from titan_vlm.data.sample import (
    ImageRef,
    VideoRef,
    image_part,
    open_bytes,
    open_file,
    open_remote,
    text_part,
    video_part,
)
from titan_vlm.errors import DataError

IMAGE_MARKER, VIDEO_MARKER = "<image>", "<video>"
_MARKERS = re.compile(f"({IMAGE_MARKER}|{VIDEO_MARKER})")
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LLAVA_ROLES |= {"system": "system"}
ROLES = ("system", "user", "assistant", "tool")
# What else a message may carry changes what is to be learnt: calls of tools, a weight, reasoning.
UNDERSTOOD = ("role", "content")
EMPTY = (None, "", [], {})  # a table gives every row every key


def from_llava(record: dict, root: str, limits: Limits = DEFAULT) -> list[dict]:
    """Messages of a LLaVA record; the k-th <image> marker is the k-th of its images, and so for
    <video>."""
    turns = expect(record, "conversations", list, "the record")
    images, videos = _paths(record, "image"), _paths(record, "video")
    limits.check_parts(len(turns) + len(images) + len(videos))
    waiting = {
        IMAGE_MARKER: [image_part(image_ref(path, root, limits)) for path in images],
        VIDEO_MARKER: [video_part(video_ref({"video": path}, root, limits)) for path in videos],
    }
    given = {marker: len(parts) for marker, parts in waiting.items()}
    found, messages = dict.fromkeys(waiting, 0), []
    for turn in turns:
        sender = expect(turn, "from", str, "a turn")
        if sender not in LLAVA_ROLES:
            raise DataError(f'from: "{sender:.60}", expected one of {", ".join(LLAVA_ROLES)}')
        parts = []
        for piece in _MARKERS.split(expect(turn, "value", str, "a turn")):
            if piece in waiting:
                found[piece] += 1
                parts += waiting[piece][:1]
                del waiting[piece][:1]
            elif piece:
                parts.append(text_part(piece))
        messages.append({"role": LLAVA_ROLES[sender], "content": parts})
    for marker, count in found.items():
        if count != given[marker]:
            kind = marker.strip("<>")
            raise DataError(
                f"{kind}-token mismatch: {count} {marker} marker(s) for {given[marker]} {kind}(s)"
            )
    check_text(messages, limits)
    return messages


def _paths(record: dict, key: str) -> list:
    """One path or a list of them."""
    named = record.get(key) or []
    if not isinstance(named, str | list):
        raise DataError(f"{key}: expected a path or a list of paths, got {shown(named)}")
    return [named] if isinstance(named, str) else named


def from_openai(
    messages: list,
    root: str,
    attached: Callable[[], ImageRef] | None = None,
    limits: Limits = DEFAULT,
) -> list[dict]:
    """Messages with every part's picture as a reference.

    `attached` hands out, in order, pictures that are stored beside the messages: parts of type
    image that name no file of their own.
    """
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    parts = sum(len(content) for content in contents if isinstance(content, list))
    limits.check_parts(len(messages) + parts)
    result = []
    for message in messages:
        role = expect(message, "role", str, "a message")
        if role not in ROLES:
            raise DataError(f'role: "{role:.60}", expected one of {", ".join(ROLES)}')
        for key, value in message.items():
            if key not in UNDERSTOOD and value not in EMPTY:
                raise DataError(
                    f'"{key:.60}" of a message is not understood; write it in its content, or '
                    "leave it out"
                )
        content = message.get("content")
        if isinstance(content, str):
            content = [text_part(content)]
        elif isinstance(content, list):
            content = [convert_part(part, root, attached, limits) for part in content]
        else:
            raise DataError("content: expected a text or a list of parts")
        result.append({"role": role, "content": content})
    check_text(result, limits)
    return result


def check_text(messages: list[dict], limits: Limits) -> None:
    parts = (part for message in messages for part in message["content"])
    limits.check_chars(sum(len(part["text"]) for part in parts if part["type"] == "text"))


def convert_part(
    part: dict, root: str, attached: Callable[[], ImageRef] | None, limits: Limits
) -> dict:
    kind = expect(part, "type", str, "a part")
    if kind == "text":
        return text_part(expect(part, "text", str, "a text part"))
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise DataError('image_url: expected {"url": "..."}')
        return image_part(image_ref(url, root, limits))
    if kind == "image":
        where = part.get("image") or part.get("path") or part.get("url")
        if where is None and attached is not None:
            return image_part(attached())
        return image_part(image_ref(where, root, limits))
    if kind == "video":
        return video_part(video_ref(part, root, limits))
    raise DataError(f'part type "{kind:.60}": expected text, image_url, image or video')


def video_ref(part: dict, root: str, limits: Limits = DEFAULT) -> VideoRef:
    """A list of frames with their rate, or a video file."""
    video = part.get("video") or part.get("path")
    if isinstance(video, str):
        path = local_path(video, root)
        limits.check_place(path, root)
        return VideoRef(path, path=path, limits=limits)
    if not isinstance(video, list) or not video:
        raise DataError("video: expected a file or a list of frames")
    limits.check_parts(len(video))
    fps = part.get("fps")
    if fps is not None and not is_rate(fps):
        raise DataError(f"fps: expected a positive number, got {shown(fps)}")
    frames = [image_ref(frame, root, limits) for frame in video]
    return VideoRef(f"video of {len(frames)} frames ({frames[0].name} ...)", frames, fps)


def is_rate(fps: object) -> bool:
    """A number that a float can hold: JSON knows Infinity, and integers of thousands of digits."""
    try:
        return type(fps) in (int, float) and fps > 0 and math.isfinite(fps)
    except OverflowError:
        return False


def image_ref(where: object, root: str, limits: Limits = DEFAULT) -> ImageRef:
    """A reference from a path, a file:// URL, a base64 data URL or, where allowed, an http URL."""
    if not isinstance(where, str) or not where:
        raise DataError(f"image: expected a path or URL, got {shown(where)}")
    if where.startswith("data:"):
        head, _, payload = where.partition(",")
        if not head.endswith(";base64"):
            raise DataError("image: a data URL must be base64")
        try:
            data = base64.b64decode(payload, validate=True)
        except ValueError as error:
            raise DataError(f"image: broken base64 data: {error}") from error
        return ImageRef("inline image", partial(open_bytes, data, limits))
    if limits.allow_remote and where.lower().startswith(("http://", "https://")):
        return ImageRef(where, partial(open_remote, where, limits))
    path = local_path(where, root)
    limits.check_place(path, root)
    return ImageRef(path, partial(open_file, path, limits))


def local_path(where: str, root: str) -> str:
    try:
        url = urlparse(where)
    except ValueError as error:
        raise DataError(f"{where:.200}: not a path or URL: {error}") from error
    if url.scheme == "file":
        return unquote(url.path)
    if url.scheme in ("http", "https", "ftp", "s3", "gs"):
        raise DataError(
            f"{where:.200}: remote files are not fetched; download it and give its path (pictures "
            "over http(s): or data.allow_remote = true)"
        )
    return os.path.join(root, where)


def expect(record: object, key: str, kind: type, what: str):
    """record[key] if it is there and of this type."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise DataError(f'{what} needs "{key}" ({kind.__name__}), got {shown(value)}')
    return value


def shown(value: object) -> str:
    """Short, however long or deeply nested it is."""
    return f"{reprlib.repr(value):.60}"
