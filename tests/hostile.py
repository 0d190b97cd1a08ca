"""Small files that cost a decoder gigabytes or minutes: one generator for each way to do it."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

GREY = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1)))


def encode(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def segment(marker, payload=b""):
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def jpeg_of_many_scans(num_scans, size=(64, 64)):
    """A progressive JPEG that passes over the picture again and again."""
    width, height = size
    quantisation = segment(0xDB, b"\0" + bytes([1]) * 64)
    frame = segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0]))
    # One code of one bit each: a difference of zero, and an end of band of 2^14 blocks and more.
    dc = segment(0xC4, b"\x00" + bytes([1]) + bytes(15) + b"\x00")
    ac = segment(0xC4, b"\x10" + bytes([1]) + bytes(15) + b"\xe0")
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(
        -(-width // 8) * -(-height // 8) // 8 + 1
    )
    num_runs = -(-width // 8) * -(-height // 8) // 16384 + 1
    again = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + bytes(2 * num_runs)
    body = quantisation + frame + dc + ac + first + again * num_scans
    return b"\xff\xd8" + body + b"\xff\xd9"


def jpeg_of_many_segments(num_segments):
    data = encode(GREY, "JPEG")
    return data[:2] + segment(0xFE) * num_segments + data[2:]


def jpeg_with_comment(comment):
    data = encode(GREY, "JPEG")
    return data[:2] + segment(0xFE, comment) + data[2:]


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(chunks, *, before=b"IDAT"):
    """A good PNG with more chunks in front of one of its own."""
    data = encode(GREY, "PNG")
    where = data.index(before) - 4
    return data[:where] + chunks + data[where:]


def tiff(entries, *, size, tail=b"", byte_order="<"):
    """A TIFF of one directory; `entries` are (tag, type, count, value or offset)."""
    width, height = size
    known = {tag for tag, *_ in entries}
    common = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (277, 3, 1, 1), (278, 4, 1, height),
    ]  # fmt: skip
    merged = sorted([*entries, *(entry for entry in common if entry[0] not in known)])
    magic = b"II" if byte_order == "<" else b"MM"
    head = struct.pack(byte_order + "2sHIH", magic, 42, 8, len(merged))
    body = b"".join(struct.pack(byte_order + "HHII", *entry) for entry in merged)
    return head + body + bytes(4) + tail


def directory_bytes(num_entries):
    return 8 + 2 + 12 * num_entries + 4


def tiff_of_many_strips(num_strips, size=(64, 64)):
    """One strip would do; there are many, all at the same place."""
    start = directory_bytes(8)
    offsets = struct.pack(f"<{num_strips}I", *([8] * num_strips))
    counts = struct.pack(f"<{num_strips}I", *([size[0]] * num_strips))
    entries = [
        (273, 4, num_strips, start), (278, 4, 1, 1),
        (279, 4, num_strips, start + len(offsets)),
    ]  # fmt: skip
    return tiff(entries, size=size, tail=offsets + counts + bytes(size[0] * size[1]))


def tiff_of_overlapping_values(num_entries, value_bytes):
    entries = [(32_000 + i, 7, value_bytes, 8) for i in range(num_entries)]
    entries += [(273, 4, 1, 8), (279, 4, 1, 64)]
    return tiff(entries, size=(8, 8), tail=bytes(value_bytes))


def tiff_of_a_huge_tile(side, *, compression=8):
    """A picture of 8 x 8 in one tile of side x side pixels."""
    packer = zlib.compressobj(1)
    tile = b"".join(packer.compress(bytes(side)) for _ in range(side)) + packer.flush()
    entries = [
        (259, 3, 1, compression), (322, 4, 1, side), (323, 4, 1, side),
        (324, 4, 1, directory_bytes(11)), (325, 4, 1, len(tile)),
    ]  # fmt: skip
    return tiff(entries, size=(8, 8), tail=tile)


def tiff_of_one_jpeg(jpeg, num_pieces):
    """A TIFF of rows of 64 pixels, all of them in the same JPEG."""
    start = directory_bytes(9)
    offsets = struct.pack(f"<{num_pieces}I", *([start + 8 * num_pieces] * num_pieces))
    counts = struct.pack(f"<{num_pieces}I", *([len(jpeg)] * num_pieces))
    entries = [
        (259, 3, 1, 7),
        (273, 4, num_pieces, start if num_pieces > 1 else start + 8),
        (278, 4, 1, 64 // num_pieces),
        (279, 4, num_pieces, start + len(offsets) if num_pieces > 1 else len(jpeg)),
    ]
    return tiff(entries, size=(64, 64), tail=offsets + counts + jpeg)


def tiff_of_planes():
    """A TIFF of RGB whose three planes come one after the other."""
    start = directory_bytes(10)
    bits = struct.pack("<3H", 8, 8, 8)
    places = struct.pack("<3I", *(start + 30 + 64 * i for i in range(3)))
    counts = struct.pack("<3I", 64, 64, 64)
    entries = [
        (258, 3, 3, start), (262, 3, 1, 2), (273, 4, 3, start + 6), (277, 3, 1, 3),
        (279, 4, 3, start + 18), (284, 3, 1, 2),
    ]  # fmt: skip
    return tiff(entries, size=(8, 8), tail=bits + places + counts + bytes(range(192)))


def tiff_of_lzma(packed):
    start = directory_bytes(9)
    entries = [(259, 3, 1, 34925), (273, 4, 1, start), (279, 4, 1, len(packed))]
    return tiff(entries, size=(8, 8), tail=packed)


def gif_of_many_extensions(num_extensions):
    data = encode(GREY, "GIF")
    where = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    return data[:where] + b"\x21\xfe\x01A\0" * num_extensions + data[where:]


def gif_of_a_large_frame(side):
    """A canvas of 1 x 1 and a frame of side x side."""
    data = bytearray(encode(GREY.resize((1, 1)), "GIF"))
    where = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    struct.pack_into("<HH", data, where + 5, side, side)
    return bytes(data)


def bmp_of_runs(size, runs):
    """A BMP compressed by run lengths (BI_RLE8)."""
    width, height = size
    palette = bytes(range(256)) * 4
    offset = 14 + 40 + len(palette)
    head = struct.pack("<2sIHHI", b"BM", offset + len(runs), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return head + info + palette + runs


def webp_chunk(kind, payload):
    return kind + struct.pack("<I", len(payload)) + payload + bytes(len(payload) % 2)


def webp_of_a_large_canvas(width, height):
    """An animation of one small frame on a canvas of any size."""
    still = encode(GREY, "WEBP", lossless=True)[12:]
    head = webp_chunk(
        b"VP8X",
        bytes([2, 0, 0, 0])
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little"),
    )
    frame = bytes(6) + (63).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0" + still
    body = b"WEBP" + head + webp_chunk(b"ANIM", bytes(6)) + webp_chunk(b"ANMF", frame)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_of_many_frames(num_frames):
    still = encode(GREY.resize((1, 1)), "WEBP", lossless=True)[12:]
    head = webp_chunk(b"VP8X", bytes([2, 0, 0, 0]) + bytes(6))
    frame = webp_chunk(b"ANMF", bytes(12) + (100).to_bytes(3, "little") + b"\0" + still)
    body = b"WEBP" + head + webp_chunk(b"ANIM", bytes(6)) + frame * num_frames
    return b"RIFF" + struct.pack("<I", len(body)) + body
