"""A tar is a unit of WebDataset samples, and what is odd in it is named."""

import pytest

from cache_builder.errors import ConfigError, SourceError
from cache_builder.sources import open_source
from tests import factories
from tests.listings import listed, read_all, rows_of

PIXEL = b"content is not looked at by a source"


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
