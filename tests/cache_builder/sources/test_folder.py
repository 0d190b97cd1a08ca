"""A folder is listed once, in one order, and nothing in it is lost or taken twice silently."""

import logging
import os

import pytest

from cache_builder.errors import SourceError
from cache_builder.formats.manifest import SourceInfo
from cache_builder.formats.plan import PlanUnit
from cache_builder.sources import open_source
from tests.listings import folder, listed, read_all, rows_of

PIXEL = b"content is not looked at by a source"


def test_folders_are_classes_and_keys_are_sorted(tmp_path):
    folder(tmp_path, "dog/2.jpg", "cat/b.PNG", "cat/a.jpeg", "dog/1/deep.webp")
    listing = listed(tmp_path)
    assert [(row.key, row.source, row.label) for row in rows_of(listing)] == [
        ("cat/a", "cat/a.jpeg", 0),
        ("cat/b", "cat/b.PNG", 0),
        ("dog/1/deep", "dog/1/deep.webp", 1),
        ("dog/2", "dog/2.jpg", 1),
    ]
    assert listing.class_names == ("cat", "dog")
    assert listing.info == SourceInfo(kind="folder", location=str(tmp_path), num_samples=4)


def test_one_image_at_the_top_makes_it_a_flat_folder_without_labels(tmp_path):
    folder(tmp_path, "a.jpg", "sub/b.jpg")
    listing = listed(tmp_path)
    assert [(row.key, row.label) for row in rows_of(listing)] == [("a", None), ("sub/b", None)]
    assert listing.class_names == ()


def test_every_row_is_read_with_its_bytes_in_order(tmp_path):
    folder(tmp_path, "a/1.jpg", "a/0.jpg", "b/0.jpg")
    assert list(read_all(tmp_path).items()) == [
        ("a/0", b"a/0.jpg"),
        ("a/1", b"a/1.jpg"),
        ("b/0", b"b/0.jpg"),
    ]


def test_names_that_are_no_keys_are_escaped(tmp_path):
    folder(tmp_path, "class 1/v1.5 café.jpg")
    (row,) = rows_of(listed(tmp_path))
    assert row.key == "class_-201/v1_-2E5_-20caf_-C3_-A9"
    assert row.source == "class 1/v1.5 café.jpg"


def test_hidden_and_other_files_are_ignored_and_counted(tmp_path, caplog):
    folder(
        tmp_path,
        "a/1.jpg",
        "a/.2.jpg",
        ".git/3.jpg",
        "a/notes.txt",
        "a/.jpg",
        "a/no_extension",
        "png",
    )
    with caplog.at_level(logging.INFO):
        assert [row.key for row in rows_of(listed(tmp_path))] == ["a/1"]
    assert "5 files are not images by their names" in caplog.text


def test_links_are_followed_and_a_loop_ends(tmp_path, caplog):
    folder(tmp_path / "elsewhere", "1.jpg")
    folder(tmp_path / "root", "b/2.jpg")
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "b" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b" / "3.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    keys = [row.key for row in rows_of(listed(tmp_path / "root"))]
    assert keys == ["a/1", "b/2", "b/3"]
    assert "b/up leads to a folder that is listed already; it is left out" in caplog.text


def test_two_files_with_one_key_are_refused(tmp_path):
    folder(tmp_path, "a/x.jpg", "a/x.png")
    with pytest.raises(
        SourceError, match=r"/x.(jpg|png) and a/x.(jpg|png) have the same key 'a/x'"
    ):
        listed(tmp_path)


def test_a_name_that_json_cannot_hold_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with open(os.fsencode(tmp_path / "images") + b"/\xff.jpg", "wb") as file:  # noqa: PTH123
        file.write(PIXEL)
    with pytest.raises(SourceError, match=r"'\\udcff.jpg' is not UTF-8. Rename the file"):
        listed(tmp_path / "images")


def test_a_listed_file_that_is_gone_is_an_error(tmp_path):
    folder(tmp_path, "a.jpg", "b.jpg")
    source = open_source(str(tmp_path))
    (unit,) = source.scan(None).units
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(SourceError, match=r"b.jpg cannot be read: No such file.*restore it"):
        list(source.read(unit))


def test_a_broken_link_is_an_error(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"a.jpg cannot be read"):
        read_all(tmp_path)


def test_units_are_slices_of_the_sorted_keys(tmp_path):
    folder(tmp_path, *(f"{i:03d}.jpg" for i in range(10)))
    listing = listed(tmp_path, unit_size=4)
    assert [[row.key for row in unit.rows] for unit in listing.units] == [
        ["000", "001", "002", "003"],
        ["004", "005", "006", "007"],
        ["008", "009"],
    ]
    assert [unit.unit for unit in listing.units] == [0, 1, 2]
    assert listing.unit_size == 4


@pytest.mark.parametrize(("num_images", "size"), [(1, 64), (64, 64), (65, 64), (4097, 128)])
def test_about_64_units_are_made_unless_told_otherwise(tmp_path, num_images, size):
    for i in range(num_images):
        (tmp_path / f"{i}.jpg").touch()
    assert listed(tmp_path).unit_size == size


def test_a_folder_without_images_is_refused_and_says_what_counts(tmp_path):
    folder(tmp_path, "notes.txt")
    with pytest.raises(SourceError, match=r"holds no images. Known extensions: bmp, gif, jpe"):
        listed(tmp_path)


def test_a_unit_is_read_whatever_else_the_folder_holds_now(tmp_path):
    folder(tmp_path, "a.jpg")
    source = open_source(str(tmp_path))
    (unit,) = source.scan(None).units
    folder(tmp_path, "0.jpg")
    assert [row.key for row, _ in source.read(unit)] == ["a"]
    assert isinstance(unit, PlanUnit)
