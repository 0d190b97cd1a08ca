"""What the head of an image file promises: files that would cost far more than their pixels.

The number of pixels bounds what a decoder does only while a file describes every pixel once. Small
files get around that: a JPEG may pass over its picture a hundred thousand times, a TIFF name a
million strips at one place, a PNG hold its colour profile five thousand times. Each of these took
minutes or gigabytes before a bound was set here, and each bound is far beyond what writers of
pictures do:

    JPEG   100 scans (progressive ones have about 10), 4,096 segments before the first
    PNG    65,536 chunks, 16 colour profiles
    GIF    65,536 blocks before the first frame
    TIFF   4,096 fields, whose values together fit into the file; strips or tiles as many as the
           picture needs, at most 100,000, none larger than the largest picture; JPEG as above
    BMP    run lengths up to 10 megapixels and 4 MB, because Pillow decodes them in Python

Only counts and lengths are read, no value is decoded, and what is damaged is left to the decoder.
It takes a few microseconds for each file; a file that is refused costs milliseconds.
"""

import re
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from cache_builder.errors import ImageError

_MAX_SCANS: Final = 100
_MAX_SCANS_OF_A_PIECE: Final = 16
_MAX_SEGMENTS: Final = 4096
_MAX_CHUNKS: Final = 65_536
_MAX_PROFILES: Final = 16
_MAX_FIELDS: Final = 4096
_MAX_PIECES: Final = 100_000
_MAX_RUN_LENGTH_PIXELS: Final = 10_000_000
_MAX_RUN_LENGTH_BYTES: Final = 4_000_000
_SMALL_TILE: Final = 1 << 20  # pixels; a tile may be larger than the largest picture of a test

_SEQUENTIAL_FRAMES: Final = (0xC0, 0xC1, 0xC9)
_PROGRESSIVE_FRAMES: Final = (0xC2, 0xCA)
_HUFFMAN_FRAMES: Final = (0xC0, 0xC1, 0xC2)
_SEGMENT: Final = struct.Struct(">BBH")  # 0xff, marker, length
_FRAME: Final = struct.Struct(">BHHB")  # bits, height, width, components
_SECOND_APP: Final = 0xE2
_START_OF_SCAN: Final = 0xDA
_END_OF_IMAGE: Final = 0xD9
# Frames, their tables, scan and restart interval, applications' own, comments.
_PLAIN_MARKERS: Final = frozenset(
    (*_HUFFMAN_FRAMES, 0xC4, 0xDA, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
)
_IN_A_SCAN: Final = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # a marker that ends a scan
_MARKER: Final = re.compile(rb"\xff+[^\x00\xff]")

# Bytes of one value of each TIFF type, and how struct names the whole numbers among them.
_TYPE_BYTES: Final = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8,
    17: 8, 18: 8,
}  # fmt: skip
_WHOLE_NUMBERS: Final = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}
_TIFF_STARTS: Final = (
    b"II\x2a\0", b"MM\0\x2a", b"II\0\x2a", b"MM\x2a\0", b"II\x2b\0", b"MM\0\x2b",
)  # fmt: skip


class JpegFrame(NamedTuple):
    """The size that a plain JPEG has as it is stored: 8 bits, greyscale or of three components."""

    width: int
    height: int


def check_header(data: bytes, *, max_pixels: int) -> JpegFrame | None:
    """Refuse a file that would cost more than its pixels.

    Args:
        data: An encoded image, whole.
        max_pixels: Largest width x height that is decoded; no tile may be larger.

    Returns:
        What a JPEG says of its picture, if every decoder reads it so; None for all else.

    Raises:
        ImageError: It would; the message says what there is too much of.
    """
    if data.startswith(b"\xff\xd8"):
        return _check_jpeg(data)
    if data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith(b"GIF8"):
        _check_gif(data)
    elif data.startswith(b"BM"):
        _check_bmp(data)
    elif data.startswith(_TIFF_STARTS):
        _check_tiff(data, max_pixels)
    return None


def _refuse_more_than(limit: int, what: str) -> ImageError:
    return ImageError(f"more than {limit:,} {what}: no picture needs them; save it anew")


def _check_jpeg(data: bytes) -> JpegFrame | None:
    frame, is_of_one_scan = _read_plain(data) or (None, _is_of_one_scan(data))
    # Two bytes that look like a scan also occur in previews and profiles, so that only a file with
    # many of them is looked at marker by marker.
    if not is_of_one_scan and data.count(b"\xff\xda") > _MAX_SCANS:
        num_scans = 0
        for number, (marker, _) in enumerate(_segments(data)):
            num_scans += marker == _START_OF_SCAN
            if num_scans > _MAX_SCANS or number >= _MAX_CHUNKS:
                raise _refuse_more_than(_MAX_SCANS, "JPEG scans")
    return frame


def _read_plain(data: bytes) -> tuple[JpegFrame, bool] | None:
    """Return the frame of a JPEG, and whether the first scan brings all of the picture.

    None is a file that leaves room for another reading: bytes between segments, markers that
    photographs do not have, several frames, an index of further pictures.
    """
    position, num_components = 2, 0
    frame: JpegFrame | None = None
    is_sequential = False
    for _ in range(_MAX_SEGMENTS):
        if position + 12 > len(data):
            return None
        lead, marker, length = _SEGMENT.unpack_from(data, position)
        if lead != 0xFF or marker not in _PLAIN_MARKERS:
            return None
        if marker == _START_OF_SCAN:
            return frame and (frame, is_sequential and data[position + 4] == num_components)
        if marker in _HUFFMAN_FRAMES:
            bits, height, width, num_components = _FRAME.unpack_from(data, position + 4)
            is_usual = bits == 8 and height and width and num_components in (1, 3)
            if frame is not None or not is_usual:
                return None
            frame, is_sequential = JpegFrame(width, height), marker in _SEQUENTIAL_FRAMES
        elif marker == _SECOND_APP and data.startswith(b"MPF\0", position + 4):
            return None
        position += 2 + length
    return None


def _is_of_one_scan(data: bytes) -> bool:
    """Whether the first scan brings all of the picture, so that decoders ignore further ones."""
    num_components = 0
    for number, (marker, position) in enumerate(_segments(data)):
        if number >= _MAX_SEGMENTS:
            raise _refuse_more_than(_MAX_SEGMENTS, "JPEG segments before the first scan")
        if marker in _SEQUENTIAL_FRAMES:
            num_components = int.from_bytes(data[position + 7 : position + 8], "big")
        elif marker in _PROGRESSIVE_FRAMES:
            return False
        elif marker == _START_OF_SCAN:
            return data[position + 2 : position + 3] == bytes([num_components])
    return False


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and position of every segment of the first picture of a JPEG file."""
    position, is_in_scan = 2, False
    while True:
        match = (_IN_A_SCAN if is_in_scan else _MARKER).search(data, position)
        if match is None:
            return
        position, marker = match.end(), data[match.end() - 1]
        if marker == _END_OF_IMAGE:
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these stand alone
            continue
        yield marker, position
        position += int.from_bytes(data[position : position + 2], "big")
        is_in_scan = marker == _START_OF_SCAN


def _check_png(data: bytes) -> None:
    position = 8
    num_profiles = 0
    read_head = struct.Struct(">I4s").unpack_from
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            return
        length, kind = read_head(data, position)
        position += length + 12
        if kind == b"IEND":
            return
        if kind == b"iCCP":
            num_profiles += 1
            if num_profiles > _MAX_PROFILES:
                raise _refuse_more_than(_MAX_PROFILES, "colour profiles in a PNG")
    raise _refuse_more_than(_MAX_CHUNKS, "chunks in a PNG")


def _check_gif(data: bytes) -> None:
    if len(data) < 13:
        return
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    is_in_block = False
    for _ in range(_MAX_CHUNKS):
        if position + 2 > len(data):
            return
        if is_in_block:
            is_in_block = data[position] != 0
            position += data[position] + 1
        elif data[position] == 0x21:  # an extension: its kind, then blocks up to an empty one
            is_in_block = True
            position += 2
        elif data[position] in (0x2C, 0x3B):  # the first frame, or the end
            return
        else:
            position += 1  # as Pillow does
    raise _refuse_more_than(_MAX_CHUNKS, "blocks before the first frame of a GIF")


def _check_bmp(data: bytes) -> None:
    if len(data) < 34:
        return
    header_bytes, width, height = struct.unpack_from("<Iii", data, 14)
    if header_bytes < 40 or struct.unpack_from("<I", data, 30)[0] not in (1, 2):
        return
    if abs(width * height) > _MAX_RUN_LENGTH_PIXELS:
        raise _refuse_more_than(_MAX_RUN_LENGTH_PIXELS, "pixels in a BMP of run lengths")
    if len(data) > _MAX_RUN_LENGTH_BYTES:
        raise _refuse_more_than(_MAX_RUN_LENGTH_BYTES, "bytes of a BMP of run lengths")


class _Field(NamedTuple):
    """One field of a TIFF directory."""

    kind: int
    num_values: int
    position: int  # of its values
    is_readable: bool  # they lie within the file


class _Directory:
    """The first directory of a TIFF file; nothing is read of its values but what is asked for."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._order = "<" if data.startswith(b"II") else ">"
        is_big = b"\x2b" in data[2:4]
        self._inline_bytes = 8 if is_big else 4
        start = self._unpack("Q" if is_big else "I", 8 if is_big else 4)
        num_fields = self._unpack("Q" if is_big else "H", start)
        if num_fields > _MAX_FIELDS:
            raise _refuse_more_than(_MAX_FIELDS, "fields in a TIFF")
        self.fields: dict[int, _Field] = {}
        self.value_bytes = 0  # of all that lies apart from its field
        position, size = start + (8 if is_big else 2), 20 if is_big else 12
        for _ in range(num_fields):
            tag, kind = self._unpack_all("HH", position)
            count = self._unpack("Q" if is_big else "I", position + 4)
            self._add(tag, kind, count, position + size - self._inline_bytes)
            position += size

    def number(self, tag: int, default: int) -> int:
        """Return the first value of a field, or `default` where it has none that counts."""
        values = self.numbers(tag, 1)
        return values[0] if values else default

    def numbers(self, tag: int, most: int) -> tuple[int, ...]:
        """Return up to `most` values of a field; none if they are not whole numbers."""
        field = self.fields.get(tag)
        if field is None or not field.is_readable or field.kind not in _WHOLE_NUMBERS:
            return ()
        code = f"{min(field.num_values, most)}{_WHOLE_NUMBERS[field.kind]}"
        return self._unpack_all(code, field.position)

    def count(self, tag: int) -> int:
        """Return how many values a field has, 0 where they are not in the file."""
        field = self.fields.get(tag)
        return field.num_values if field is not None and field.is_readable else 0

    def _add(self, tag: int, kind: int, count: int, position: int) -> None:
        num_bytes = _TYPE_BYTES.get(kind, 0) * count
        if num_bytes > self._inline_bytes:
            position = self._unpack("Q" if self._inline_bytes == 8 else "I", position)
        is_readable = num_bytes > 0 and position + num_bytes <= len(self._data)
        if is_readable and num_bytes > self._inline_bytes:
            self.value_bytes += num_bytes
        self.fields.setdefault(tag, _Field(kind, count, position, is_readable))

    def _unpack(self, code: str, position: int) -> int:
        return self._unpack_all(code, position)[0]

    def _unpack_all(self, code: str, position: int) -> tuple[int, ...]:
        return struct.unpack_from(self._order + code, self._data, position)


def _check_tiff(data: bytes, max_pixels: int) -> None:
    try:
        directory = _Directory(data)
    except struct.error:
        return  # it ends before its directory does
    if directory.value_bytes > len(data) + _SMALL_TILE:
        raise ImageError("the fields of the TIFF name more bytes than there are; save it anew")
    width, height = directory.number(256, 0), directory.number(257, 0)
    if 324 in directory.fields:
        piece_width, piece_height = directory.number(322, width), directory.number(323, height)
        offsets, lengths = 324, 325
        if piece_width * piece_height > max(max_pixels, _SMALL_TILE):
            raise ImageError(
                f"tiles of {piece_width} x {piece_height} pixels are more than the limit of "
                f"{max_pixels:,}"
            )
    else:
        piece_width, piece_height = width, directory.number(278, height)
        offsets, lengths = 273, 279
    num_pieces = directory.count(offsets)
    num_needed = -(-width // max(1, piece_width)) * -(-height // max(1, piece_height))
    if directory.number(284, 1) == 2:
        num_needed *= directory.number(277, 1)
    # A few too many are the mistake of a writer; they cost no more than those that are needed.
    if num_pieces > 2 * num_needed + 16:
        raise ImageError(
            f"{num_pieces:,} strips or tiles where {num_needed:,} are enough; save it anew"
        )
    if num_pieces > _MAX_PIECES:
        raise _refuse_more_than(_MAX_PIECES, "strips or tiles in a TIFF")
    if directory.number(259, 1) in (6, 7):
        _check_jpeg_in_tiff(data, num_pieces, directory.numbers(lengths, _MAX_PIECES))


def _check_jpeg_in_tiff(data: bytes, num_pieces: int, lengths: tuple[int, ...]) -> None:
    # Pieces that share their bytes would multiply the scans in them.
    if num_pieces > 1 and (len(lengths) < num_pieces or sum(lengths) > len(data)):
        raise ImageError("the strips or tiles of the TIFF overlap; save it anew")
    most = _MAX_SCANS + _MAX_SCANS_OF_A_PIECE * num_pieces
    if data.count(b"\xff\xda") > most:
        raise _refuse_more_than(most, "JPEG scans in a TIFF")
