"""The directory of a zip, and one member read by one range.

The directory is read as it lies, in pieces, and not held: archives of a million images are in use.
The archive may be hostile: what it claims is checked where it is used, and names are believed only
after a look at them.
"""

import bz2
import struct
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from cache_builder.errors import ImageError, SourceError
from cache_builder.formats.headers import shorten
from cache_builder.sources.containers import Container, unreadable
from cache_builder.sources.names import MAX_IMAGE_BYTES

STORED: Final = 0
DEFLATED: Final = 8
BZIP2: Final = 12
METHODS = frozenset({STORED, DEFLATED, BZIP2})

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LENGTHS = struct.Struct("<3H")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT_BYTES = 0xFFFF
_PIECE_BYTES = 1 << 20
_EXTRA_SLACK = 1024  # of a local header, whose extra fields may be longer than the directory's
_32 = 0xFFFF_FFFF
_16 = 0xFFFF


class ZipMember(NamedTuple):
    """An entry of the directory."""

    name: str
    is_encrypted: bool
    is_link: bool
    method: int
    num_bytes: int  # as it claims
    offset: int  # of its local header
    span_bytes: int  # from there to the end of its content, but for extra fields


def zip_members(zip_file: Container) -> Iterator[ZipMember]:
    """Yield the entries of the directory, folders left out.

    Raises:
        SourceError: It is no zip, or cut short.
    """
    num_entries, num_bytes, start, shift = _find_directory(zip_file)
    buffer, at, position, stop = b"", 0, start, start + num_bytes
    for _ in range(num_entries):
        while len(buffer) < at + _ENTRY.size or len(buffer) < at + _entry_bytes(buffer, at):
            piece = zip_file.read(position, min(_PIECE_BYTES, stop - position))
            if not piece:
                raise _damaged(zip_file, "its directory is cut short")
            buffer, at = buffer[at:] + piece, 0
            position += len(piece)
        signature, made, _, flags, method, _, _, _, packed, size, n, m, _, _, _, mode, offset = (
            _ENTRY.unpack_from(buffer, at)
        )
        if signature != b"PK\1\2":
            raise _damaged(zip_file, "its directory is damaged")
        raw = buffer[at + _ENTRY.size : at + _ENTRY.size + n]
        if m:
            extra = buffer[at + _ENTRY.size + n : at + _ENTRY.size + n + m]
            size, packed, offset = _large_values(extra, size, packed, offset)
        at += _entry_bytes(buffer, at)
        name = raw.decode("utf-8", "surrogateescape") if flags & 0x800 else raw.decode("cp437")
        if not name.endswith("/"):
            yield ZipMember(
                name=name,
                is_encrypted=bool(flags & 0x41),
                is_link=made >> 8 == 3 and (mode >> 16) & 0o170000 == 0o120000,
                method=method,
                num_bytes=size,
                offset=offset + shift,
                span_bytes=_LOCAL.size + n + packed,
            )


def read_zip_member(zip_file: Container, name: str, span: tuple[int, int]) -> bytes:
    """Return the content of a member.

    Raises:
        SourceError: It is not where it was, or the file is cut short.
        ImageError: It does not inflate to what it claims, or to more than an image may have.
    """
    offset, span_bytes = span
    data = zip_file.read(offset, span_bytes + _EXTRA_SLACK)
    if len(data) < _LOCAL.size:
        raise _damaged(zip_file, f"it is cut short at member {name}")
    signature, _, flags, method, _, _, checksum, _, _, n, m = _LOCAL.unpack_from(data)
    raw = data[_LOCAL.size : _LOCAL.size + n]
    names = (raw.decode("utf-8", "replace"), raw.decode("cp437"))
    if signature != b"PK\3\4" or name not in names:
        raise SourceError(
            f"{zip_file.location} has no member {shorten(name)} any more. Restore the zip."
        )
    start = _LOCAL.size + n + m
    packed_bytes = span_bytes - _LOCAL.size - n
    if len(data) < start + packed_bytes:
        data += zip_file.read(offset + len(data), start + packed_bytes - len(data))
    packed = data[start : start + packed_bytes]
    if len(packed) < packed_bytes:
        raise _damaged(zip_file, f"it is cut short at member {name}")
    content = _unpacked(packed, method)
    # With flag 8 the checksum lies behind the content.
    if not flags & 8 and zlib.crc32(content) != checksum:
        raise ImageError("its content is damaged (CRC)")
    return content


def _unpacked(packed: bytes, method: int) -> bytes:
    if method == STORED:
        return packed
    try:
        if method == DEFLATED:
            inflater = zlib.decompressobj(-15)
            content = inflater.decompress(packed, MAX_IMAGE_BYTES + 1)
            is_whole = inflater.eof
        else:
            unpacker = bz2.BZ2Decompressor()
            content = unpacker.decompress(packed, MAX_IMAGE_BYTES + 1)
            is_whole = unpacker.eof
    except (zlib.error, OSError, ValueError) as exc:
        raise ImageError(f"its content is damaged ({exc})") from exc
    if len(content) > MAX_IMAGE_BYTES:
        raise ImageError(f"it inflates to more than the limit of {MAX_IMAGE_BYTES:,} bytes")
    if not is_whole:
        raise ImageError("its content is cut short")
    return content


def _find_directory(zip_file: Container) -> tuple[int, int, int, int]:
    """Return number of entries, bytes, place, and what all offsets are too small by."""
    tail_bytes = min(zip_file.num_bytes, _MAX_COMMENT_BYTES + _END.size + _LOCATOR.size)
    tail_start = zip_file.num_bytes - tail_bytes
    tail = zip_file.read(tail_start, tail_bytes)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + _END.size:
        raise _damaged(zip_file, "it has no directory at its end")
    _, _, _, _, num_entries, num_bytes, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    if _16 == num_entries or _32 in (num_bytes, start):
        locator = zip_file.read(end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
        if locator[:4] == b"PK\6\7":
            end -= _LOCATOR.size
            end_64 = zip_file.read(end - _END_64.size, _END_64.size)
            if end_64[:4] != b"PK\6\6":
                end_64 = zip_file.read(_LOCATOR.unpack(locator)[2], _END_64.size)
                end = _LOCATOR.unpack(locator)[2] + _END_64.size
            if len(end_64) < _END_64.size or end_64[:4] != b"PK\6\6":
                raise _damaged(zip_file, "its directory is damaged")
            *_, num_entries, num_bytes, start = _END_64.unpack(end_64)
            end -= _END_64.size
    shift = end - num_bytes - start  # what stands in front of the archive, as in one that unpacks
    if shift < 0 or num_bytes > zip_file.num_bytes:
        raise _damaged(zip_file, "its directory is not where it says")
    return num_entries, num_bytes, start + shift, shift


def _entry_bytes(buffer: bytes, at: int) -> int:
    name, extra, comment = _LENGTHS.unpack_from(buffer, at + 28)
    return int(_ENTRY.size + name + extra + comment)


def _large_values(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Take what does not fit 32 bits from the zip64 field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            numbers = list(struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4))
            values = [
                numbers.pop(0) if value == _32 and numbers else value
                for value in (size, packed, offset)
            ]
            return values[0], values[1], values[2]
        extra = extra[4 + length :]
    return size, packed, offset


def _damaged(zip_file: Container, what: str) -> SourceError:
    return unreadable(zip_file.location, what, "as a zip")
