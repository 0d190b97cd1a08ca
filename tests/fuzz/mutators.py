"""Damage to a file: blind, or by one who knows its format.

Blind damage is what disks, networks and killed writers do. Damage by structure reaches what lies
behind a parser: a number in a header, a field of a JSON object, a size in a tar or a zip. Some of
it mends the checksums that the file carries in itself: such a file is *forged*, and may be another
valid one. Everything is a function of the generator alone.
"""

import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.mutants import damage

Rng = np.random.Generator
Mutator = Callable[[bytes, Rng], bytes]

BOUNDS = (0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
_VALUES = (
    None, True, False, "", "x", "../../etc/passwd", "\u20ac\u0000", "9" * 5000, -1, 0, 1, 7, 65_535,
    65_536, 2**31, 2**63, 2**64, 10**30, -0.5, 1e-320, 1e308, [], {}, [[]], [None], {"a": None},
)  # fmt: skip
_DEPTH = 3000  # of brackets; json, pydantic and safetensors each have a limit of their own


class Mutant(NamedTuple):
    """A damaged file."""

    data: bytes
    how: str  # names of the mutators
    is_forged: bool


def mutate(data: bytes, rng: Rng, mutators: Sequence[Mutator], others: Sequence[bytes]) -> Mutant:
    """Damage a file one to three times; `others` are those that it may be spliced with."""
    applied = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not mutators or rng.random() < 0.4:
            applied.append("blind")
            data = damage(data, rng, others)
            continue
        mutator = mutators[rng.integers(len(mutators))]
        applied.append(mutator.__name__)
        data = mutator(data, rng)
    forged = {mutator.__name__ for mutator in FORGERS}
    return Mutant(data, "+".join(applied), not forged.isdisjoint(applied))


def number(data: bytes, rng: Rng) -> bytes:
    """Replace an integer of 1 to 8 bytes by a bound, or move it a little."""
    size = int(rng.choice([1, 2, 4, 8]))
    if len(data) < size:
        return data
    # Headers are at one of the two ends.
    end = min(len(data), 512) if rng.random() < 0.5 else len(data)
    start = int(rng.integers(max(1, end - size + 1)))
    order = "little" if rng.random() < 0.7 else "big"
    old = int.from_bytes(data[start : start + size], order)
    value = _other_number(old, rng) % 256**size
    return data[:start] + value.to_bytes(size, order) + data[start + size :]


def digits(data: bytes, rng: Rng) -> bytes:
    """Replace a number that is written in digits."""
    found = list(re.finditer(rb"\d+", data[:100_000]))
    if not found:
        return data
    match = found[rng.integers(len(found))]
    value = str(_other_number(int(match[0][:18]), rng)).encode()
    if rng.random() < 0.5:
        value = value[: len(match[0])].rjust(len(match[0]), b"0")
    return data[: match.start()] + value + data[match.end() :]


def json_value(data: bytes, rng: Rng) -> bytes:
    """Edit one place of a JSON text, and write the whole as patchcache does."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return data
    return _write(edit(tree, rng))


def json_line(data: bytes, rng: Rng) -> bytes:
    """Edit one place of one line of JSON."""
    lines = data.splitlines(keepends=True)
    if not lines:
        return data
    chosen = rng.integers(len(lines))
    lines[chosen] = json_value(lines[chosen], rng)
    return b"".join(lines)


def deep_json(data: bytes, rng: Rng) -> bytes:
    """Put brackets in brackets, somewhere or instead of everything."""
    deep = (b"[" if rng.random() < 0.5 else b'{"a":') * _DEPTH
    start = data.find(b":", int(rng.integers(len(data) + 1))) + 1
    return deep if rng.random() < 0.3 else data[:start] + deep + data[start:]


def edit(tree: Any, rng: Rng) -> Any:
    """Return a JSON value with one place edited."""
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        name = list(tree)[rng.integers(len(tree))]
        kind = rng.random()
        if kind < 0.06:
            return {key: value for key, value in tree.items() if key != name}
        if kind < 0.1:
            return {key + "x" * (key == name): value for key, value in tree.items()}
        other = list(tree)[rng.integers(len(tree))]
        if kind < 0.14:
            return {**tree, name: tree[other], other: tree[name]}
        return {**tree, name: edit(tree[name], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        place, other = (int(i) for i in rng.integers(len(tree), size=2))
        kind = rng.random()
        if kind < 0.06:
            return tree[:place] + tree[place + 1 :]
        if kind < 0.12:
            return [*tree[:place], tree[place], *tree[place:]]
        edited = list(tree)
        if kind < 0.2:
            edited[place], edited[other] = tree[other], tree[place]
        else:
            edited[place] = edit(tree[place], rng)
        return edited
    return _other_value(tree, rng)


def safetensors_header(data: bytes, rng: Rng) -> bytes:
    """Edit the JSON header of a safetensors file, or the JSON texts within its metadata."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header.get("__metadata__", {})
        if metadata and rng.random() < 0.6:
            name = list(metadata)[rng.integers(len(metadata))]
            metadata[name] = _write(edit(json.loads(metadata[name]), rng)).decode().strip()
        else:
            header = edit(header, rng)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data
    text = _write(header).strip()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def tar_header(data: bytes, rng: Rng) -> bytes:
    """Edit a field of a tar header and mend its checksum."""
    starts = [
        start
        for start in range(0, len(data) - 511, 512)
        if data[start + 257 : start + 262] == b"ustar"
    ]
    if not starts:
        return data
    start = starts[rng.integers(len(starts))]
    header = bytearray(data[start : start + 512])
    where, size = ((0, 100), (124, 12), (156, 1), (157, 100), (345, 155))[rng.integers(5)]
    if where == 124:
        value = b"%011o\0" % (_other_number(int(header[124:135] or b"0", 8), rng) % 8**11)
    elif where == 156:
        value = b"01234567xgLKSD\0"[int(rng.integers(15)) :][:1]
    else:
        name = bytes(header[where : where + size]).rstrip(b"\0")
        value = damage(name or b"x", rng, [name or b"x"])
    header[where : where + size] = value[:size].ljust(size, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


def tar_order(data: bytes, rng: Rng) -> bytes:
    """Leave out, repeat or exchange whole blocks of a tar."""
    blocks = [data[i : i + tarfile.BLOCKSIZE] for i in range(0, len(data), tarfile.BLOCKSIZE)]
    if len(blocks) < 2:
        return data
    return _disordered(blocks, rng)


def _disordered(parts: list[bytes], rng: Rng) -> bytes:
    """Join parts of which one is left out or repeated, or two are exchanged."""
    first, second = (int(i) for i in rng.integers(len(parts), size=2))
    kind = rng.integers(3)
    if kind == 0:
        del parts[first]
    elif kind == 1:
        parts.insert(second, parts[first])
    else:
        parts[first], parts[second] = parts[second], parts[first]
    return b"".join(parts)


_ZIP_FIELDS = {
    # Signature: offsets and sizes of flags, method, CRC, sizes, lengths of names, and offset.
    b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x01\x02": ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)),
    b"PK\x05\x06": ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    b"PK\x06\x06": ((24, 8), (32, 8), (40, 8), (48, 8)),
}


def zip_header(data: bytes, rng: Rng) -> bytes:
    """Edit a field of a local header, of the directory or of its end."""
    signature = list(_ZIP_FIELDS)[rng.integers(len(_ZIP_FIELDS))]
    starts = [match.start() for match in re.finditer(re.escape(signature), data)]
    if not starts:
        return data
    fields = _ZIP_FIELDS[signature]
    offset, size = fields[rng.integers(len(fields))]
    start = starts[rng.integers(len(starts))] + offset
    old = int.from_bytes(data[start : start + size], "little")
    value = (_other_number(old, rng) % 256**size).to_bytes(size, "little")
    return data[:start] + value + data[start + size :]


def zip_member(data: bytes, rng: Rng) -> bytes:
    """Damage the content of a stored member and mend its CRC: a forgery."""
    spans = []
    for match in re.finditer(rb"PK\x01\x02", data):
        entry = data[match.start() : match.start() + 46]
        if len(entry) < 46:
            continue
        num_bytes, offset = struct.unpack("<I", entry[20:24])[0], struct.unpack("<I", entry[42:])[0]
        names = data[offset + 26 : offset + 30]
        if num_bytes and len(names) == 4:
            start = offset + 30 + sum(struct.unpack("<HH", names))
            spans.append((match.start(), offset, start, start + num_bytes))
    if not spans:
        return data
    # Half of the forgeries are of the first member, which is the pickle of a checkpoint.
    entry_at, offset, start, stop = spans[0 if rng.random() < 0.5 else rng.integers(len(spans))]
    content = data[start:stop]
    forged = (number if rng.random() < 0.4 else damage_in_place)(content, rng)
    crc = zlib.crc32(forged).to_bytes(4, "little")
    whole = bytearray(data)
    whole[start:stop] = forged
    whole[entry_at + 16 : entry_at + 20] = whole[offset + 14 : offset + 18] = crc
    # What torch writes has its CRC behind the content.
    if data[stop : stop + 4] == b"PK\x07\x08":
        whole[stop + 4 : stop + 8] = crc
    return bytes(whole)


def damage_in_place(data: bytes, rng: Rng) -> bytes:
    """Damage without a change of length."""
    return damage(data, rng, [data])[: len(data)].ljust(len(data), b"\0")


def npy_header(data: bytes, rng: Rng) -> bytes:
    """Edit the header of a .npy, alone or within a tar; its length stays."""
    starts = [match.start() for match in re.finditer(rb"\x93NUMPY", data)]
    if not starts:
        return data
    start = starts[rng.integers(len(starts))]
    end = data.find(b"\n", start) + 1
    header = data[start + 10 : end]
    words = (
        (b"False", b"True"),
        (b"<u2", b"|O"),
        (b"<u2", b">u2"),
        (b"<u2", b"<f8"),
        (b"(", b"(9,"),
    )
    if rng.random() < 0.4:
        old, new = words[rng.integers(len(words))]
        edited = header.replace(old, new)
    else:
        edited = (digits if rng.random() < 0.7 else damage_in_place)(header, rng)
    edited = edited.rstrip(b" \n")[: len(header) - 1].ljust(len(header) - 1) + b"\n"
    return data[: start + 10] + edited + data[end:]


def lines(data: bytes, rng: Rng) -> bytes:
    """Leave out, repeat or exchange lines of a text."""
    parts = data.splitlines(keepends=True)
    return _disordered(parts, rng) if parts else data


FORGERS = (zip_member,)


def _other_number(old: int, rng: Rng) -> int:
    kind = rng.integers(4)
    if kind == 0:
        return abs(old + int(rng.integers(-3, 4)))
    if kind == 1:
        return old ^ (1 << int(rng.integers(64)))
    if kind == 2:
        return old * int(rng.choice([2, 10, 1000]))
    return BOUNDS[rng.integers(len(BOUNDS))]


def _other_value(old: Any, rng: Rng) -> Any:
    if rng.random() < 0.35:
        return _VALUES[rng.integers(len(_VALUES))]
    if isinstance(old, bool) or old is None:
        return not old
    if isinstance(old, int):
        return _other_number(old, rng) * int(rng.choice([1, 1, 1, -1]))
    if isinstance(old, float):
        return float(old * rng.choice([-1, 0, 1.5, 1e300, 1e-300]))
    if isinstance(old, str):
        return damage(old.encode() or b"x", rng, [b"0", b"/", b"a.b"]).decode(errors="replace")
    return _VALUES[rng.integers(len(_VALUES))]


def _write(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode() + b"\n"
