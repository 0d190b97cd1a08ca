"""Hostile archives are refused and recorded, never fatal and never silent."""

import gzip
import io
import json
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest

from cache_builder.errors import ArtifactError, ImageError, SourceError
from cache_builder.formats.plan import PlanRow, PlanUnit
from cache_builder.formats.sample import from_npy
from cache_builder.imaging import decode
from cache_builder.sources import names, zip_headers
from cache_builder.sources.reading import read_unit
from tests import factories
from tests.listings import listed, read_all, rows_of

GOOD = factories.encode(factories.draw_patches(factories.random_ids(0)))


def write_members(path, *members, mode="w", tar_format=tarfile.GNU_FORMAT):
    """Write (name, data, changes of the header)."""
    with tarfile.open(path, mode, format=tar_format) as tar:
        for name, data, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in changes.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


HOSTILE = {
    "/etc/passwd.jpg": ({}, "its name is an absolute path"),
    "C:\\x.jpg": ({}, "its name is an absolute path"),
    "../../up.jpg": ({}, "its name leads out of its folder (..)"),
    "a\\..\\..\\up.jpg": ({}, "its name leads out of its folder (..)"),
    "soft.jpg": ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "it is a link, not a file"),
    "hard.jpg": ({"type": tarfile.LNKTYPE, "linkname": "good.png"}, "it is a link, not a file"),
    "zero.jpg": ({"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "it is a device, not a"),
    "pipe.jpg": ({"type": tarfile.FIFOTYPE}, "it is a device, not a file"),
    "not\udcffutf8.jpg": ({}, "its name is not UTF-8"),
}


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_members_of_a_hostile_tar_are_recorded_and_the_others_are_tokenised(
    tmp_path, codebook_path, suffix, tar_format
):
    tar = write_members(
        tmp_path / f"t.{suffix}",
        *((name, b"", changes) for name, (changes, _) in HOSTILE.items()),
        ("deep/" * 40 + "good.png", GOOD, {}),
        ("../labels.txt", b"", {}),
        mode="w:gz" if suffix.endswith("gz") else "w",
        tar_format=tar_format,
    )
    out = tmp_path / "cache"
    manifest = factories.build_cache(images=str(tar), codebook=codebook_path, out=out)
    assert (manifest.num_samples, manifest.num_skipped) == (1, len(HOSTILE))
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    reasons = {sample["source"]: sample["reason"] for sample in skipped}
    for name, (_, reason) in HOSTILE.items():
        assert reason in reasons[name.replace("\udcff", "\\xff")]
    assert not (tmp_path / "up.jpg").exists()


def test_members_of_a_hostile_zip_are_recorded_and_the_others_are_read(tmp_path):
    path = tmp_path / "t.zip"
    link = zipfile.ZipInfo("link.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("/abs.jpg", "../up.jpg", "good.png", "secret.jpg", "odd.jpg", "x\u00e9.jpg"):
            archive.writestr(name, GOOD)
        archive.writestr(link, "/etc/passwd")
        archive.writestr("lzma.jpg", GOOD, zipfile.ZIP_LZMA)
    data = path.read_bytes().replace("x\u00e9.jpg".encode(), b"x\xff\xff.jpg")
    path.write_bytes(encrypted(data, b"secret.jpg"))
    images = read_all(path)
    assert images.pop("good") == images.pop("odd") == GOOD
    assert images == {
        "/abs": "its name is an absolute path",
        "_-2E_-2E/up": "its name leads out of its folder (..)",
        "secret": "it is encrypted",
        "link": "it is a link, not a file",
        "lzma": "it is compressed by method 14; stored, deflate and bzip2 are read",
        "x_-FF_-FF": "its name is not UTF-8",
    }


def encrypted(data, name):
    """Set the flag of encryption in the directory of a zip."""
    data = bytearray(data)
    at = data.rindex(name) - 46 + 8
    struct.pack_into("<H", data, at, struct.unpack_from("<H", data, at)[0] | 1)
    return bytes(data)


def test_a_member_above_the_limit_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "MAX_IMAGE_BYTES", 1000)
    path = write_members(tmp_path / "t.tar", ("a.jpg", b"x" * 1001, {}), ("b.jpg", b"x" * 1000, {}))
    (large, right) = rows_of(listed(path))
    assert large.refused == "it has 1,001 bytes, more than the limit of 1,000"
    assert not right.refused
    factories.write_folder(tmp_path / "f", {"a.jpg": b"x" * 1001, "b.jpg": b""})
    assert read_all(tmp_path / "f") == {"a": large.refused, "b": b""}


def test_a_member_of_a_zip_that_inflates_beyond_the_limit_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(zip_headers, "MAX_IMAGE_BYTES", 1 << 20)
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(64 << 20))
        archive.writestr("good.jpg", GOOD)
    data = bytearray(path.read_bytes())
    # The bomb claims to be small, in both of its headers.
    for at in (22, data.index(b"PK\1\2") + 24):
        struct.pack_into("<L", data, at, 1000)
    path.write_bytes(data)
    assert read_all(path) == {
        "bomb": "it inflates to more than the limit of 1,048,576 bytes", "good": GOOD,
    }  # fmt: skip


def test_a_compressed_tar_that_inflates_beyond_all_measure_is_stopped(tmp_path):
    path = tmp_path / "t.tar.gz"
    header = tarfile.TarInfo("a.jpg")
    header.size = 1 << 40
    packer = zlib.compressobj(9, wbits=31)
    with path.open("wb") as file:
        file.write(packer.compress(header.tobuf()))
        for _ in range(40):
            file.write(packer.compress(bytes(8 << 20)))
        file.write(packer.flush())
    with pytest.raises(SourceError, match=r"inflates to more than 268,435,456: a bomb"):
        listed(path)


def test_a_header_that_claims_more_memory_than_a_name_needs_ends_the_tar(tmp_path):
    path = write_members(tmp_path / "t.tar", ("x" * 200 + ".jpg", b"", {}))
    data = bytearray(path.read_bytes())
    data[124:136] = b"%011o\0" % (1 << 32)
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"the header at byte 512 claims 4,294,967,296 bytes"):
        listed(path)


@pytest.mark.parametrize("size", [b"-0000001000\0", b"\x80" + (2**63 - 1).to_bytes(11)])
def test_a_size_that_leads_back_or_beyond_any_file_ends_the_tar(tmp_path, size):
    info = tarfile.TarInfo("a.jpg")
    header = bytearray(info.tobuf())
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "t.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(SourceError, match=r"t.tar cannot be read as a tar: .*damaged at byte 0"):
        listed(tmp_path / "t.tar")


def test_a_device_in_a_folder_is_refused(tmp_path):
    factories.write_folder(tmp_path, {"b.jpg": GOOD})
    (tmp_path / "a.jpg").symlink_to("/dev/zero")
    assert read_all(tmp_path) == {"a": "it is a device, not a file", "b": GOOD}


@pytest.mark.parametrize(("name", "content"), [("a.cls", b"9" * 12), ("a.json", b'{"label": 1e6}')])
def test_a_label_that_is_no_class_does_not_make_a_billion_names(tmp_path, name, content):
    path = write_members(tmp_path / "t.tar", ("a.jpg", GOOD, {}), (name, content, {}))
    if b"e6" in content:  # a number, but no integer
        assert rows_of(listed(path))[0].label is None
        return
    with pytest.raises(SourceError, match=r"a.jpg has the label 999,999,999,999, and classes are"):
        listed(path)


def test_texts_beside_an_image_are_read_up_to_a_limit(tmp_path):
    path = write_members(
        tmp_path / "t.tar", ("a.jpg", GOOD, {}), ("a.json", b" " * (1 << 21), {}),
        ("b.jpg", GOOD, {}),
    )  # fmt: skip
    assert read_all(path) == {
        "a": "its a.json has 2,097,152 bytes, more than the limit of 1,048,576", "b": GOOD,
    }  # fmt: skip


def test_json_that_nobody_can_hold_is_tamed(tmp_path):
    nested = b'{"x": ' * 40 + b"1" + b"}" * 40
    fields = b'{"deep": %s, "nan": NaN, "huge": 1e999, "bad": "\\ud800", "int": %s}' % (
        nested, b"9" * 40,
    )  # fmt: skip
    path = write_members(tmp_path / "t.tar", ("a.jpg", GOOD, {}), ("a.json", fields, {}))
    extra = rows_of(listed(path))[0].extra
    assert extra["nan"] is None
    assert extra["huge"] is None
    assert extra["bad"] == "?"
    assert extra["int"] == "9" * 40
    assert json.dumps(extra["deep"]).count("{") == 16
    bottomless = b'{"x": ' * 100_000 + b"1" + b"}" * 100_000
    write_members(path, ("a.jpg", GOOD, {}), ("a.json", bottomless, {}))
    with pytest.raises(SourceError, match=r"label in a.json cannot be read: maximum recursion"):
        listed(path)


def test_a_sparse_member_is_refused_and_what_follows_is_read(tmp_path):
    header = tarfile.TarInfo("a.jpg")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[482] = 1  # one more block of the map of holes follows
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    good = write_members(tmp_path / "g.tar", ("b.jpg", GOOD, {})).read_bytes()
    path = tmp_path / "t.tar"
    path.write_bytes(bytes(block) + bytes(512) + b"x" * 512 + good)
    assert read_all(path) == {"a": "it is a sparse file", "b": GOOD}


def test_a_pixel_bomb_is_refused_by_its_header():
    def chunk(kind, data):
        return (
            struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
        )

    header = struct.pack(">LLBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + (chunk(b"IEND", b""))
    )
    with pytest.raises(ImageError, match=r"60000 x 60000 pixels|too large to decode"):
        decode(bomb)


def test_a_pickle_in_an_array_is_refused_and_not_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Touch()], object), allow_pickle=True)
    for payload in (buffer.getvalue(), pickle.dumps(Touch())):
        with pytest.raises(ArtifactError, match=r"x.npy is damaged"):
            from_npy(payload, "x.npy")
    assert not (tmp_path / "touched").exists()


def test_a_cut_compressed_tar_is_refused(tmp_path):
    plain = write_members(tmp_path / "p.tar", ("a.jpg", GOOD * 50, {})).read_bytes()
    path = tmp_path / "t.tgz"
    data = gzip.compress(plain)
    for cut in (0, 5, len(data) // 2, len(data) - 4):
        path.write_bytes(data[:cut])
        with pytest.raises(SourceError, match="cannot be read as a tar"):
            listed(path)
    path.write_bytes(gzip.compress(plain[:2048]) + gzip.compress(plain[2048:]))
    assert read_all(path) == {"a": GOOD * 50}


@pytest.mark.timeout(60)
def test_pipes_and_sockets_among_images_are_recorded_and_never_waited_for(
    tmp_path, codebook_path, monkeypatch
):
    images = factories.write_folder(tmp_path / "images", {"a/good.png": GOOD})
    os.mkfifo(images / "a/pipe.jpg")
    os.mkfifo(images / "a/pipe.txt")
    monkeypatch.chdir(images / "a")  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
        out = tmp_path / "cache"
        manifest = factories.build_cache(images=str(images), codebook=codebook_path, out=out)
    assert (manifest.num_samples, manifest.num_skipped) == (1, 2)
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {sample["source"]: sample["reason"] for sample in skipped} == {
        "a/pipe.jpg": "it is a named pipe, not a file",
        "a/socket.jpg": "it is a socket, not a file",
    }


@pytest.mark.timeout(60)
def test_pipes_and_folders_with_the_names_of_archives_are_left_out_by_name(tmp_path, caplog):
    images = factories.write_folder(tmp_path / "images", {"a.zip/good.png": GOOD})
    for name in ("pipe.tar", "pipe.parquet"):
        os.mkfifo(images / name)
    assert read_all(images) == {"a.zip/good".replace(".", "_-2E"): GOOD}
    assert f"{images}/pipe.tar is not a file and is left out" in caplog.text
    (images / "gone.tar").symlink_to(tmp_path / "nothing")
    with pytest.raises(SourceError, match=r"gone.tar cannot be opened: No such file"):
        listed(images)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["pipe.tar", "pipe.zip", "pipe.parquet", "pipe.txt"])
def test_a_pipe_in_the_place_of_a_source_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(SourceError, match=f"{name} is neither a file nor a folder. Pass a folder"):
        listed(tmp_path / name)


@pytest.mark.timeout(60)
def test_a_pipe_that_a_list_names_is_recorded(tmp_path):
    folder = factories.write_folder(tmp_path, {"good.png": GOOD, "list.txt": b"good.png\npipe.png"})
    os.mkfifo(folder / "pipe.png")
    images = read_all(folder / "list.txt")
    assert images == {"good": GOOD, "pipe": "it is a named pipe, not a file"}


def test_a_plan_that_names_a_file_as_no_file_system_can_is_answered_by_name(tmp_path):
    unit = PlanUnit(unit=0, container="a\0b.tar", rows=(PlanRow(key="a", source="a.png"),))
    with pytest.raises(SourceError, match=r"a\\x00b.tar cannot be opened: .*Restore it"):
        list(read_unit("", unit))
    folder = PlanUnit(unit=0, rows=(PlanRow(key="a", source="a\0.png"),))
    with pytest.raises(
        SourceError, match=r"a\\x00.png cannot be read: embedded null byte.*restore it"
    ):
        list(read_unit(str(tmp_path), folder))


def test_a_label_that_is_no_class_is_told_with_its_source(tmp_path):
    tar = factories.write_tar(tmp_path / "t.tar", [("a.png", GOOD), ("a.cls", b"8589934595")])
    with pytest.raises(SourceError, match=r"t.tar: .*label 8,589,934,595.*Mend the label"):
        listed(tar)


def test_an_error_that_quotes_a_hostile_name_is_one_line_for_any_terminal():
    assert str(SourceError("a\nb\x1b[31m")) == "a\\nb\\x1b[31m"
    assert str(SourceError("\u20ac is fine")) == "\u20ac is fine"
