"""The headers of a tar archive, one after the other; nothing is ever extracted.

    header 512 | data of 3:jpg, padded to 512 | header | data of 3:txt ... | zeros

A reader of our own, because the standard library's keeps every header it has seen in memory, takes
a damaged header in the middle for the end, and, in the Pythons of the day, goes round in circles
for a negative size. Names are texts here, never paths: a member called ../../x is one with an odd
name. Links, folders, devices and sparse files hold no bytes of their own and are passed over.

Formats: v7, ustar, pax (path and size), GNU (long names).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from titan_vlm.errors import DataError

BLOCK = 512
PIECE = 2**20  # of what is behind the end
MAX_NAME_BYTES = 2**16  # of a header that only holds the name of the next
FILES = (b"0", b"\0", b"7")
NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
ABOUT_OTHERS = (b"x", b"L", b"g", b"K")
POSIX = b"ustar\0"


@dataclass(frozen=True)
class Member:
    """A regular file of `size` bytes that begins at `offset`."""

    name: str
    offset: int
    size: int


def members(path: str) -> Iterator[Member]:
    """The files of an archive in order.

    Raises:
        DataError: it is damaged here or ends within a member; says at which byte.
    """
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        offset, told = 0, {}  # what a header says about the next
        while offset < end:
            file.seek(offset)
            header = file.read(BLOCK)
            if not header.strip(b"\0"):
                check_end(file, offset)
                return
            kind, size = header[156:157], parse_header(header, offset)
            data = offset + BLOCK
            if kind not in ABOUT_OTHERS:
                size = told.get("size", size)
            if kind == b"S":
                data = after_sparse_map(file, header, data)
            elif kind in NO_DATA:
                size = 0
            following = data + -(-size // BLOCK) * BLOCK
            if following > end:
                raise DataError(f"ends {following - end} bytes too early (byte {offset})")
            if kind in (b"x", b"L"):
                told = told | read_told(file, kind, size, offset)
            else:
                name = told.get("name") or header_name(header)
                # A folder, in the oldest format, is a file whose name ends so.
                if kind in FILES and "sparse" not in told and not name.endswith("/"):
                    yield Member(name, data, size)
                if kind not in ABOUT_OTHERS:
                    told = {}
            offset = following


def check_end(file: BinaryIO, offset: int) -> None:
    """Zeros end an archive only where nothing but zeros follows: else they are a hole in it, as a
    copy leaves that was cut off."""
    at = file.tell()
    for piece in iter(partial(file.read, PIECE), b""):
        if rest := piece.lstrip(b"\0"):
            at += len(piece) - len(rest)
            raise DataError(
                f"zeros at byte {offset} and more at byte {at}: a hole, or archives one after the "
                "other, which tar --concatenate would join"
            )
        at += len(piece)


def parse_header(header: bytes, offset: int) -> int:
    """The size it states, if its checksum is right."""
    try:
        if len(header) < BLOCK:
            raise ValueError
        # The checksum is made with blanks in its own place.
        if parse_number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ValueError
        return parse_number(header[124:136])
    except ValueError as error:
        raise DataError(f"no tar header at byte {offset}") from error


def parse_number(field: bytes) -> int:
    """Octal digits, or binary after 0x80; never negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if digits and not digits.isdigit():  # int() would take signs and underscores
        raise ValueError
    return int(digits or b"0", 8)


def header_name(header: bytes) -> str:
    name = text(header[:100])
    prefix = text(header[345:500]) if header[257:263] == POSIX else ""
    return f"{prefix}/{name}" if prefix else name


def text(field: bytes) -> str:
    return field.split(b"\0")[0].decode(errors="replace")


def after_sparse_map(file: BinaryIO, header: bytes, offset: int) -> int:
    """Where the data of a GNU sparse file begins: further blocks may describe its holes."""
    more = header[482]
    while more:
        block = file.read(BLOCK)
        offset += BLOCK
        more = block[504] if len(block) == BLOCK else 0
    return offset


def read_told(file: BinaryIO, kind: bytes, size: int, offset: int) -> dict:
    """What a pax or GNU header says about the next: name, size, whether it is sparse."""
    if size > MAX_NAME_BYTES:
        raise DataError(f"a name of {size} bytes at byte {offset}, at most {MAX_NAME_BYTES}")
    data = file.read(size)
    if kind == b"L":
        return {"name": text(data)}
    told = {}
    try:
        for key, value in pax_records(data):
            if key == b"path":
                told["name"] = text(value)
            elif key == b"size":
                if not value.isdigit():
                    raise ValueError
                told["size"] = int(value)
            elif key.startswith(b"GNU.sparse."):
                told["sparse"] = True
    except ValueError as error:
        raise DataError(f"malformed pax header at byte {offset}") from error
    return told


def pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of every "length key=value\\n"."""
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 10)
        if space < 0 or not data[at:space].isdigit():
            raise ValueError
        end = at + int(data[at:space])
        record = data[space + 1 : end]
        if end > len(data) or not record.endswith(b"\n"):
            raise ValueError
        key, _, value = record[:-1].partition(b"=")
        yield key, value
        at = end
