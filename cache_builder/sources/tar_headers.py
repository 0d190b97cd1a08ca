"""The headers of a tar, read forward: POSIX ustar and pax, and GNU's long names.

The tar may be hostile: what a header claims is believed only as far as it costs nothing. Nothing is
ever written under a member's name, links are not followed, and a header that wants more memory than
any name needs ends the tar.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from cache_builder.sources.containers import Stream, unreadable

BLOCK_BYTES = 512

TarKind = Literal["file", "folder", "link", "device", "sparse"]

_END = bytes(BLOCK_BYTES)
_MAX_NAME_BYTES = 1 << 20  # of an extended header
_MAX_MEMBER_BYTES = 1 << 62  # no file is so long, and the place behind it still fits an offset
_FILES = (b"0", b"\0", b"7")
_KINDS: dict[bytes, TarKind] = {
    b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"5": "folder", b"6": "device",
    b"S": "sparse",
}  # fmt: skip
_WITHOUT_CONTENT = frozenset(b"123456")


class TarMember(NamedTuple):
    """One member; its content lies at `offset`."""

    name: str
    kind: TarKind
    offset: int
    num_bytes: int


class TarHeader(NamedTuple):
    """One block of 512 bytes."""

    name: bytes
    num_bytes: int
    type: bytes
    is_extended: bool  # GNU sparse: another block follows


def tar_members(stream: Stream, where: str) -> Iterator[TarMember]:
    """Yield the members of a tar; the stream then stands at the member's content.

    Raises:
        SourceError: The tar is cut short or damaged.
    """
    position = 0
    name, num_bytes, is_sparse = b"", -1, False  # of the member to come, by extended headers
    while (block := stream.read(BLOCK_BYTES)) != _END:
        header = parse_header(block)
        if header is None:
            raise unreadable(where, f"cut short or damaged at byte {position:,}", "as a tar")
        position += BLOCK_BYTES
        if header.type in (b"L", b"K", b"x", b"g"):
            if header.num_bytes > _MAX_NAME_BYTES:
                claim = f"the header at byte {position:,} claims {header.num_bytes:,} bytes"
                raise unreadable(where, claim, "as a tar")
            content = stream.read(header.num_bytes)
            if header.type == b"L":
                name = content.split(b"\0", 1)[0]
            elif header.type == b"x":
                fields = _pax_fields(content)
                name = fields.get(b"path", name)
                num_bytes = _decimal(fields.get(b"size", b"-1"))
                is_sparse = any(field.startswith(b"GNU.sparse.") for field in fields)
            position += _padded(header.num_bytes)
            stream.seek(position)
            continue
        extended = header.is_extended
        while extended:
            block = stream.read(BLOCK_BYTES)
            extended = len(block) == BLOCK_BYTES and bool(block[504])
            position += BLOCK_BYTES
        size = header.num_bytes if num_bytes < 0 else num_bytes
        kind = _KINDS.get(header.type, "file")
        if header.type == b"\0" and header.name.endswith(b"/"):
            kind = "folder"
        if header.type in _FILES or header.type in _KINDS:
            text = (name or header.name).decode("utf-8", "surrogateescape")
            yield TarMember(text, "sparse" if is_sparse else kind, position, size)
        if header.type[0] not in _WITHOUT_CONTENT:
            position += _padded(size)
        stream.seek(position)
        name, num_bytes, is_sparse = b"", -1, False


def parse_header(block: bytes) -> TarHeader | None:
    """Read one block; None if it is not a whole header."""
    if len(block) < BLOCK_BYTES:
        return None
    try:
        checksum = int(block[148:156].strip(b" \0") or b"0", 8)
        size = block[124:136]
        if size[0] & 0x80:
            num_bytes = int.from_bytes(bytes([size[0] & 0x7F]) + size[1:])
        else:
            num_bytes = int(size.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    # The checksum counts itself as spaces.
    if checksum != sum(block) - sum(block[148:156]) + 8 * 0x20:
        return None
    # Python reads a minus in an octal number; such a size would lead back to this very header.
    if not 0 <= num_bytes <= _MAX_MEMBER_BYTES:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    kind = block[156:157]
    return TarHeader(name, num_bytes, kind, is_extended=kind == b"S" and bool(block[482]))


def _pax_fields(content: bytes) -> dict[bytes, bytes]:
    """Read records of the form `LENGTH NAME=VALUE`, each with a line feed; damage ends them."""
    fields = {}
    while content:
        length = _decimal(content.split(b" ", 1)[0])
        if not 0 < length <= len(content):
            break
        _, _, record = content[: length - 1].partition(b" ")
        field, _, value = record.partition(b"=")
        fields[field] = value
        content = content[length:]
    return fields


def _decimal(text: bytes) -> int:
    return int(text) if text.isdigit() and len(text) <= 18 else -1


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
