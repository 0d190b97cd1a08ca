"""Zip archives: folders inside are classes, and large archives are cut into units."""

import struct
import zipfile

import pytest

from cache_builder.errors import ConfigError, SourceError
from cache_builder.formats.manifest import SourceInfo
from cache_builder.sources import open_source
from tests import factories
from tests.listings import folder, listed, read_all, rows_of


def write_zip(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def test_folders_in_a_zip_are_classes(tmp_path):
    path = write_zip(
        tmp_path / "t.zip",
        {"dog/2.jpg": b"2", "cat/": b"", "cat/b.PNG": b"b", "cat/x.txt": b"no",
         "cat/.h.jpg": b"no", ".git/x.jpg": b"no", "__MACOSX/cat/b.jpg": b"no",
         "cat/v1.2/png": b"no"},
    )  # fmt: skip
    listing = listed(path)
    assert [(row.key, row.source, row.label) for row in rows_of(listing)] == [
        ("cat/b", "cat/b.PNG", 0),
        ("dog/2", "dog/2.jpg", 1),
    ]
    assert listing.class_names == ("cat", "dog")
    assert listing.info == SourceInfo(kind="zip", location=str(path), num_samples=2)
    assert read_all(path) == {"cat/b": b"b", "dog/2": b"2"}


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]
)
def test_members_are_read_however_they_are_compressed(tmp_path, compression):
    content = {f"{i}.jpg": bytes([i]) * i * 1000 for i in range(5)}
    path = write_zip(tmp_path / "t.zip", content, compression)
    assert read_all(path) == {str(i): bytes([i]) * i * 1000 for i in range(5)}


def test_a_zip_written_to_a_stream_or_behind_a_program_is_read(tmp_path):
    class Unseekable:
        def __init__(self, file):
            self.write, self.flush = file.write, file.flush

    path = tmp_path / "t.zip"
    with path.open("wb") as file:
        file.write(b"#!/bin/sh\n")  # sizes and checksums lie behind the content
        with zipfile.ZipFile(Unseekable(file), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jpg", b"a" * 999)
            archive.writestr("b.jpg", b"b" * 999)
    assert read_all(path) == {"a": b"a" * 999, "b": b"b" * 999}


@pytest.mark.slow
def test_a_zip_of_more_members_than_16_bits_count_is_read(tmp_path):
    path = write_zip(tmp_path / "t.zip", {f"{i:05d}.jpg": b"" for i in range(65_600)})
    assert listed(path).info.num_samples == 65_600


def test_archives_are_cut_into_units_of_sorted_keys(tmp_path):
    for name, num in (("a", 5), ("b", 3)):
        write_zip(tmp_path / f"{name}.zip", {f"{name}{i}.jpg": b"%d" % i for i in range(num)})
    listing = listed(tmp_path, unit_size=2)
    assert [[row.key for row in unit.rows] for unit in listing.units] == [
        ["a0", "a1"], ["a2", "a3"], ["a4"], ["b0", "b1"], ["b2"],
    ]  # fmt: skip
    assert (listing.num_units, listing.unit_size) == (5, 2)
    assert [unit.unit for unit in listing.units] == [0, 1, 2, 3, 4]
    assert listed(tmp_path / "{a,b}.zip", unit_size=2).units == listing.units
    assert read_all(tmp_path, unit_size=2)["b2"] == b"2"


def test_what_is_no_zip_or_has_changed_is_an_error(tmp_path):
    path = tmp_path / "t.zip"
    path.write_bytes(b"no zip" * 100)
    with pytest.raises(SourceError, match="cannot be read as a zip: it has no directory"):
        listed(path)
    write_zip(path, {f"{i}.jpg": b"x" * 100 for i in range(3)})
    content = path.read_bytes()
    for cut in range(1, len(content), 7):
        path.write_bytes(content[cut:])
        with pytest.raises(SourceError, match="cannot be read as a zip"):
            listed(path)
    path.write_bytes(content)
    source = open_source(str(path))
    (unit,) = source.scan(None).units
    write_zip(path, {f"{i}.jpg": b"x" * 100 for i in range(4)})
    with pytest.raises(SourceError, match=r"and had \d+ when it was listed: it has changed"):
        list(source.read(unit))
    write_zip(path, {f"{i}.JPG": b"x" * 100 for i in range(3)})
    with pytest.raises(SourceError, match=r"no member 0.jpg any more. Restore the zip"):
        list(source.read(unit))


def test_a_zip_without_images_and_kinds_that_are_mixed_are_refused(tmp_path):
    write_zip(tmp_path / "t.zip", {"a.txt": b""})
    with pytest.raises(SourceError, match="no zip holds an image"):
        listed(tmp_path / "t.zip")
    factories.write_tar(tmp_path / "t.tar", [("a.jpg", b"")])
    with pytest.raises(ConfigError, match=r"several kinds: webdataset, zip\. Name those of one"):
        listed(tmp_path)
    with pytest.raises(ConfigError, match="several kinds"):
        listed(tmp_path / "t.{tar,zip}")


def test_a_damaged_member_is_refused_and_the_others_are_read(tmp_path):
    path = write_zip(tmp_path / "t.zip", {"a.jpg": b"a" * 100, "b.jpg": b"b" * 100})
    data = bytearray(path.read_bytes())
    data[data.index(b"aaa") + 5] ^= 1
    path.write_bytes(data)
    assert read_all(path) == {"a": "its content is damaged (CRC)", "b": b"b" * 100}


def test_the_folder_of_a_flat_zip_gives_no_labels(tmp_path):
    path = write_zip(tmp_path / "t.zip", {"a.jpg": b"", "x/b.jpg": b""})
    assert [row.label for row in rows_of(listed(path))] == [None, None]
    folder(tmp_path / "one", "a.jpg", "x/b.jpg")
    assert listed(tmp_path / "one").class_names == listed(path).class_names == ()


def test_a_directory_that_points_outside_the_file_is_refused(tmp_path):
    path = write_zip(tmp_path / "t.zip", {"a.jpg": b"a"})
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\5\6")
    struct.pack_into("<L", data, end + 12, 0x7FFF_FFFF)
    path.write_bytes(data)
    with pytest.raises(SourceError, match="its directory is not where it says"):
        listed(path)


def test_a_member_that_lies_beyond_any_file_is_damage_and_no_crash(tmp_path):
    path = write_zip(tmp_path / "t.zip", {"a.jpg": b"a"})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    zip64 = struct.pack("<2HQ", 1, 8, 2**63)
    struct.pack_into("<H", data, entry + 30, len(zip64))
    struct.pack_into("<L", data, entry + 42, 0xFFFF_FFFF)
    data[entry + 46 + len("a.jpg") : entry + 46 + len("a.jpg")] = zip64
    end = data.rindex(b"PK\5\6")
    struct.pack_into("<L", data, end + 12, end - entry)
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"cannot be read as a zip: it is cut short at member a"):
        read_all(path)
