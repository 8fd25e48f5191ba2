"""Checksums of a table's files, so that a flipped bit never changes a result.

A shard keeps two CRC-32s in the metadata of its Parquet footer: of all bytes before the footer, and
of the rest with that second number as zeros. Shards of earlier versions have none.
Other files of a table end in the CRC-32 of what precedes it.
"""

from __future__ import annotations

import functools
import os
import struct
import zlib
from pathlib import Path
from typing import IO

from backbones.common.files import file_problem

CHECKSUM_KEY, PLACEHOLDER = b"backbones.checksum", b"00000000 00000000"
"""What a shard's writer adds to the footer's metadata, for :func:`sign` to fill in."""

_MAGIC = b"PAR1"
_END = struct.Struct("<I4s")  # length of the footer, and the magic
# Thrift's compact encoding of the key and the value: a string's field and its length come first.
# No other text of a footer holds such a control character.
_MARK = CHECKSUM_KEY + b"\x18" + bytes([len(PLACEHOLDER)])
_CHUNK = 1 << 22
_TRAILER = b"crc32 %08x"
_TRAILER_BYTES = len(_TRAILER % 0)


def sign(file: IO[bytes]) -> None:
    """Fill the checksums into a complete Parquet file.

    Args:
        file: open for reading and writing; its metadata has :data:`PLACEHOLDER`.
    """
    start, footer = _footer(file)
    place = footer.index(_MARK) + len(_MARK)
    footer[place : place + 8] = b"%08x" % _crc(file, start)
    footer[place + 9 : place + 17] = b"%08x" % zlib.crc32(footer)
    file.seek(start + place)
    file.write(footer[place : place + 17])


def flaw(path: Path) -> str | None:
    """Why a shard cannot be trusted; None if it can, or has no checksum.

    A file is not read again by this process until it changes.
    """
    found = os.stat(path)
    return _flaw(path, found.st_ino, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 17)
def _flaw(path: Path, *_: int) -> str | None:
    if (problem := file_problem(path)) is not None:
        return f"it {problem}"
    with open(path, "rb") as file:
        start, footer = _footer(file)
        if start < len(_MAGIC):
            return "it is not a complete Parquet file"
        place = footer.find(_MARK) + len(_MARK)
        if place < len(_MARK):
            return None  # of an earlier version
        body, end = bytes(footer[place : place + 8]), bytes(footer[place + 9 : place + 17])
        footer[place + 9 : place + 17] = b"00000000"
        if end != b"%08x" % zlib.crc32(footer) or body != b"%08x" % _crc(file, start):
            return "its checksum is wrong"
    return None


def _footer(file: IO[bytes]) -> tuple[int, bytearray]:
    """Where the footer of a Parquet file begins, and its bytes; a start of 0 if there is none."""
    size = file.seek(0, os.SEEK_END)
    if size < _END.size:
        return 0, bytearray()
    length, magic = _END.unpack(_read(file, size - _END.size, _END.size))
    start = size - _END.size - length
    if magic != _MAGIC or not length or start < 0:
        return 0, bytearray()
    return start, bytearray(_read(file, start, size - start))


def append_checksum(path: Path) -> None:
    """Append the checksum of a file to it."""
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        trailer = _TRAILER % _crc(file, end)
        file.seek(end)
        file.write(trailer)


def verify(path: Path) -> bool:
    """Whether a file ends in the checksum of what precedes it, see :func:`append_checksum`."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END) - _TRAILER_BYTES
        return end >= 0 and _read(file, end, _TRAILER_BYTES) == _TRAILER % _crc(file, end)


def _read(file: IO[bytes], start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _crc(file: IO[bytes], size: int) -> int:
    """The checksum of the first ``size`` bytes."""
    file.seek(0)
    crc = 0
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            break
        crc, size = zlib.crc32(chunk, crc), size - len(chunk)
    return crc
