"""A source is listed once, in one order, and nothing in it is lost or taken twice silently."""

import logging
import os
from pathlib import Path

import pytest

from cache_builder.errors import ConfigError, SourceError
from cache_builder.formats.manifest import PlanUnit, SourceInfo
from cache_builder.sources import ImageJoin, open_source
from tests import factories

PIXEL = b"content is not looked at by a source"


def rows_of(listing):
    return [row for unit in listing.units for row in unit.rows]


def listed(location, unit_size=None):
    return open_source(str(location)).scan(unit_size)


def read_all(location):
    source = open_source(str(location))
    return {row.key: data for unit in source.scan(None).units for row, data in source.read(unit)}


def folder(root, *names):
    return factories.write_folder(root, {name: name.encode() for name in names})


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
    folder(tmp_path, "a/1.jpg", "a/.2.jpg", ".git/3.jpg", "a/notes.txt", "a/no_extension", "a/.jpg")
    with caplog.at_level(logging.INFO):
        assert [row.key for row in rows_of(listed(tmp_path))] == ["a/1"]
    assert "4 files are not images by their names" in caplog.text


def test_links_are_followed_and_a_loop_ends(tmp_path):
    folder(tmp_path / "elsewhere", "1.jpg")
    folder(tmp_path / "root", "b/2.jpg")
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "b" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b" / "3.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    keys = [row.key for row in rows_of(listed(tmp_path / "root"))]
    assert keys == ["a/1", "b/2", "b/3"]


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


def test_a_place_that_is_not_there_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"nowhere is not there. Pass a folder of images"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match=r"x-0.tar is not there, nor are 2 others"):
        open_source(str(tmp_path / "x-{0..2}.tar"))
    folder(tmp_path, "file.rar")
    with pytest.raises(ConfigError, match=r"neither a folder nor a \.tar, .*\.zip, \.parquet"):
        open_source(str(tmp_path / "file.rar"))


def test_a_tar_is_a_unit_of_webdataset_samples(tmp_path):
    tar = factories.write_tar(
        tmp_path / "t.tar",
        [
            ("b/2.jpg", b"two"),
            ("b/2.cls", b"7\n"),
            ("b/2.txt", b"a caption"),
            ("./a/1.v2.jpg", b"one"),  # the key ends at the first dot
            ("a/1.json", b'{"label": 3, "x": 1}'),
            ("c.PNG", b"three"),
            ("d.txt", b"no image"),
            (".hidden.jpg", b"no"),
        ],
    )
    listing = listed(tar)
    (unit,) = listing.units
    assert [(row.key, row.source, row.label) for row in unit.rows] == [
        ("a/1", "./a/1.v2.jpg", 3),
        ("b/2", "b/2.jpg", 7),
        ("c", "c.PNG", None),
    ]
    assert unit.container == str(tar)
    assert read_all(tar)["b/2"] == b"two"


def test_labels_of_a_tar_name_their_classes_by_number(tmp_path):
    tar = factories.write_tar(tmp_path / "t.tar", [("a.jpg", PIXEL), ("a.cls", b"2")])
    assert listed(tar).class_names == ("0", "1", "2")


@pytest.mark.parametrize("label", [b"-1", b"-7"])
def test_a_negative_label_is_no_label(tmp_path, label):
    tar = factories.write_tar(tmp_path / "t.tar", [("a.jpg", PIXEL), ("a.cls", label)])
    assert rows_of(listed(tar))[0].label is None


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.cls", b"cat"), ("a.json", b"{"), ("a.json", b"[]"), ("a.cls", b"\xff")],
)
def test_a_label_that_cannot_be_read_is_an_error(tmp_path, name, content):
    tar = factories.write_tar(tmp_path / "t.tar", [("a.jpg", PIXEL), (name, content)])
    with pytest.raises(SourceError, match=f"The label in {name} cannot be read"):
        listed(tar)


def test_tars_are_found_by_braces_or_in_a_folder_in_the_same_order(tmp_path):
    for i in range(3):
        factories.write_tar(tmp_path / f"t-{i}.tar", [(f"{i}.jpg", b"%d" % i)])
    by_braces = listed(tmp_path / "t-{0..2}.tar")
    in_folder = listed(tmp_path)
    assert by_braces.units == in_folder.units
    assert [unit.rows[0].key for unit in by_braces.units] == ["0", "1", "2"]
    assert by_braces.info.location == str(tmp_path / "t-{0..2}.tar")
    assert by_braces.unit_size == 64
    assert read_all(tmp_path) == {"0": b"0", "1": b"1", "2": b"2"}


def test_the_listing_does_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    factories.write_tar(tmp_path / "t.tar", [("a.jpg", PIXEL)])
    folder(tmp_path / "images", "a.jpg")
    for name in ("t.tar", "images"):
        absolute = listed(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            assert listed(name) == absolute


def test_one_key_in_two_tars_is_refused(tmp_path):
    for name in "ab":
        factories.write_tar(tmp_path / f"{name}.tar", [("x.jpg", PIXEL)])
    with pytest.raises(SourceError, match="same key 'x'"):
        listed(tmp_path)


def test_two_images_of_one_sample_are_refused(tmp_path):
    tar = factories.write_tar(tmp_path / "t.tar", [("x.seg.png", PIXEL), ("x.jpg", PIXEL)])
    with pytest.raises(SourceError, match=r"2 images share the key 'x'.*ends a key at the first"):
        listed(tar)


def test_two_members_that_differ_in_case_alone_are_refused(tmp_path):
    tar = factories.write_tar(tmp_path / "t.tar", [("x.jpg", PIXEL), ("x.JPG", PIXEL)])
    with pytest.raises(SourceError, match=r"x.jpg and x.JPG are one name"):
        listed(tar)


def test_a_tar_without_images_is_refused(tmp_path):
    with pytest.raises(SourceError, match="no tar holds an image"):
        listed(factories.write_tar(tmp_path / "t.tar", [("a.txt", b"")]))


def test_a_cut_tar_is_refused_and_not_taken_for_a_shorter_one(tmp_path):
    tar = factories.write_tar(tmp_path / "t.tar", [(f"{i}.jpg", b"x" * 700) for i in range(4)])
    content = tar.read_bytes()
    for size in range(0, 4 * 1536, 512):
        tar.write_bytes(content[:size])
        with pytest.raises(SourceError, match="cannot be read as a tar"):
            listed(tar)
    tar.write_bytes(content)
    factories.flip_byte(tar, 1536)  # in the second header
    with pytest.raises(SourceError, match="damaged at byte 1,536"):
        listed(tar)


def test_a_compressed_tar_is_refused(tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(b"\x1f\x8b" + b"\0" * 600)
    with pytest.raises(SourceError, match="cannot be read as a tar"):
        listed(path)


def test_a_tar_that_has_changed_since_it_was_listed_is_an_error(tmp_path):
    tar = factories.write_tar(tmp_path / "t.tar", [("a.jpg", PIXEL), ("b.jpg", PIXEL)])
    source = open_source(str(tar))
    (unit,) = source.scan(None).units
    factories.write_tar(tar, [("a.jpg", PIXEL)])
    with pytest.raises(SourceError, match=r"no member b.jpg any more. Restore the tar"):
        list(source.read(unit))


def test_a_unit_size_has_no_meaning_for_tars(tmp_path):
    tar = factories.write_tar(tmp_path / "t.tar", [("a.jpg", PIXEL)])
    with pytest.raises(ConfigError, match="one tar is one unit"):
        listed(tar, unit_size=2)


@pytest.fixture
def planned(tmp_path, codebook_path):
    """Plan a cache without images; return its folder and what joins it to its source."""

    def plan(images):
        out = tmp_path / "cache"
        written = factories.plan_cache(images=str(images), codebook=codebook_path, out=out)
        return out, written.spec.source

    return plan


def test_images_of_a_cache_without_them_are_found_by_key(tmp_path, planned):
    cache, info = planned(folder(tmp_path / "images", "a/1.jpg", "b/2.jpg"))
    join = ImageJoin(cache, info)
    assert join.read(0, "b/2") == b"b/2.jpg"
    assert join.read(0, "a/1") == b"a/1.jpg"
    with pytest.raises(SourceError, match="unit 0 has no image of key c"):
        join.read(0, "c")


def test_images_that_have_moved_are_found_at_their_new_place(tmp_path, planned):
    cache, info = planned(folder(tmp_path / "images", "a/1.jpg"))
    (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(SourceError, match=r"images is not there. Name the folder"):
        ImageJoin(cache, info)
    assert ImageJoin(cache, info, str(tmp_path / "moved")).read(0, "a/1") == b"a/1.jpg"


def test_images_in_tars_are_found_also_when_the_tars_have_moved(tmp_path, planned):
    (tmp_path / "tars").mkdir()
    for i in range(2):
        factories.write_tar(tmp_path / f"tars/{i}.tar", [(f"{i}.jpg", b"%d" % i)])
    cache, info = planned(tmp_path / "tars")
    join = ImageJoin(cache, info)
    assert [join.read(i, str(i)) for i in (1, 0)] == [b"1", b"0"]
    (tmp_path / "tars").rename(tmp_path / "moved")
    with pytest.raises(SourceError, match="0.tar cannot be opened: No such file"):
        ImageJoin(cache, info).read(0, "0")
    for place in ("moved", "moved/{0..1}.tar"):
        assert ImageJoin(cache, info, str(tmp_path / place)).read(1, "1") == b"1"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
def test_a_tar_closes_itself_when_it_is_no_longer_held(tmp_path, planned):
    tar = factories.write_tar(tmp_path / "t.tar", [("a.jpg", PIXEL)])
    cache, info = planned(tar)

    def num_open():
        return sum(link.resolve() == tar for link in Path("/proc/self/fd").iterdir())

    join = ImageJoin(cache, info)
    join.read(0, "a")
    assert num_open() == 1
    del join
    assert num_open() == 0


def test_a_unit_is_read_whatever_else_the_folder_holds_now(tmp_path):
    folder(tmp_path, "a.jpg")
    source = open_source(str(tmp_path))
    (unit,) = source.scan(None).units
    folder(tmp_path, "0.jpg")
    assert [row.key for row, _ in source.read(unit)] == ["a"]
    assert isinstance(unit, PlanUnit)
