"""A text file that names images, with labels or without."""

import pytest

from cache_builder.errors import ConfigError, SourceError
from cache_builder.sources import open_source
from tests.listings import folder, listed, read_all, rows_of


def write_list(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_paths_are_relative_to_the_list_or_absolute(tmp_path):
    folder(tmp_path, "images/b.jpg", "images/a.v2.png", "elsewhere/c")
    path = write_list(tmp_path / "images/t.txt", "b.jpg", "", "a.v2.png", f"{tmp_path}/elsewhere/c")
    listing = listed(path)
    keys = [row.key for row in rows_of(listing)]
    assert keys == sorted(["b", "a_-2Ev2", f"{tmp_path}/elsewhere/c".lstrip("/")])
    assert (listing.info.kind, listing.info.location) == ("list", str(path))
    assert set(read_all(path).values()) == {b"images/b.jpg", b"images/a.v2.png", b"elsewhere/c"}


def test_labels_are_numbers_or_names(tmp_path):
    path = write_list(tmp_path / "t.txt", "a.jpg\t2", "b.jpg\t0", "c.jpg", "d.jpg\t-1")
    listing = listed(path)
    assert [row.label for row in rows_of(listing)] == [2, 0, None, None]
    assert listing.class_names == ("0", "1", "2")
    listing = listed(write_list(path, "a.jpg\towl", "b.jpg\tant", "c.jpg\t7"))
    assert [row.label for row in rows_of(listing)] == [2, 1, 0]
    assert listing.class_names == ("7", "ant", "owl")


def test_units_are_slices_of_the_sorted_keys(tmp_path):
    path = write_list(tmp_path / "t.txt", *(f"{i}.jpg" for i in (3, 1, 2)))
    assert [[row.key for row in unit.rows] for unit in listed(path, 2).units] == [["1", "2"], ["3"]]


def test_a_line_that_is_none_of_a_list_is_named_by_its_number(tmp_path):
    path = tmp_path / "t.txt"
    for content, message in (
        (b"a.jpg\nb.jpg\t1\t2\n", "line 2 has 3 columns"),
        (b"a.jpg\n\xff.jpg\n", "line 2 is not UTF-8"),
        (b"a\0b\n", "line 1 is no path or URL"),
        (b"x" * 70_000, "line 1 is no path or URL"),
        (b"\n \n", "names no images"),
        (b"a.jpg\na.png\n", "same key 'a'"),
        (b"a.jpg\n\t3\n", "line 2 names no image: a path or URL stands first"),
        (b"./\n", "line 1 names no image"),
        (b"a.jpg\t5000000\n", "has the label 5,000,000, and classes are numbered below"),
    ):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=message):
            listed(path)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(SourceError, match=r"a.jpg cannot be read: No such file"):
        read_all(write_list(tmp_path / "t.txt", "a.jpg"))


def test_several_lists_are_refused(tmp_path):
    for i in range(2):
        write_list(tmp_path / f"{i}.txt", "a.jpg")
    with pytest.raises(ConfigError, match=r"names 2 lists\. Join them"):
        open_source(str(tmp_path / "{0..1}.txt"))
