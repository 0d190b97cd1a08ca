"""A plain tar, written front to back, with headers that tell nothing but name and size.

Python's tarfile makes these headers, byte for byte, at ten times the cost: it is a tenth of what a
worker does beside decoding and tokenising. Names that do not fit a plain header are left to it.
"""

import tarfile
from collections.abc import Mapping
from typing import Protocol

_BLOCK_BYTES = tarfile.BLOCKSIZE
_NAME_BYTES = 100
_SIZE = slice(124, 136)
_CHECKSUM = slice(148, 155)
_MODE = 0o444


class Writable(Protocol):
    """What a tar is written into."""

    def write(self, data: bytes) -> int:
        """Append bytes."""


class TarStream:
    """Appends files to a tar; `offset` is its length so far, in bytes."""

    def __init__(self, file: Writable) -> None:
        """Begin a tar at the present end of `file`."""
        self._file = file
        self.offset = 0

    def add(self, files: Mapping[str, bytes]) -> list[int]:
        """Append files, written at once; return where the content of each starts."""
        parts: list[bytes] = []
        starts, end = [], self.offset
        for name, data in files.items():
            header, padding = _header(name, len(data)), bytes(-len(data) % _BLOCK_BYTES)
            parts += (header, data, padding)
            starts.append(end + len(header))
            end = starts[-1] + len(data) + len(padding)
        self._write(b"".join(parts))
        return starts

    def finish(self) -> None:
        """Write the end of the tar, filled up to a whole record as tarfile does."""
        self._write(bytes(2 * _BLOCK_BYTES))
        self._write(bytes(-self.offset % tarfile.RECORDSIZE))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.offset += len(data)


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, _MODE
    return info


def _tobuf(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


_PLAIN = _tobuf(_info("", 0))
_PLAIN_SUM = int(_PLAIN[_CHECKSUM].rstrip(b"\0"), 8) - sum(_PLAIN[_SIZE])


def _header(name: str, size: int) -> bytes:
    encoded = name.encode()
    if len(encoded) > _NAME_BYTES or not name.isascii() or size >= 8**11:
        return _tobuf(_info(name, size))
    digits = b"%011o\0" % size
    checksum = b"%06o\0" % (_PLAIN_SUM + sum(encoded) + sum(digits))
    header = bytearray(_PLAIN)
    header[: len(encoded)] = encoded
    header[_SIZE] = digits
    header[_CHECKSUM] = checksum
    return bytes(header)
