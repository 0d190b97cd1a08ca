"""The name of a place says what is there."""

import pytest

from cache_builder.errors import ConfigError, SourceError
from cache_builder.sources import names, open_source
from tests import factories
from tests.listings import folder, listed

PIXEL = b"content is not looked at by a source"


def test_a_place_that_is_not_there_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"nowhere is not there. Pass a folder of images"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match=r"x-0.tar is not there, nor are 2 others"):
        open_source(str(tmp_path / "x-{0..2}.tar"))
    with pytest.raises(ConfigError, match=r"place of the images is empty. Name a folder"):
        open_source("")
    folder(tmp_path, "file.rar")
    with pytest.raises(ConfigError, match=r"neither a folder nor a \.tar, .*\.zip, \.parquet"):
        open_source(str(tmp_path / "file.rar"))


def test_the_listing_does_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    factories.write_tar(tmp_path / "t.tar", [("a.jpg", PIXEL)])
    folder(tmp_path / "images", "a.jpg")
    for name in ("t.tar", "images"):
        absolute = listed(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            assert listed(name) == absolute


def test_a_link_is_what_its_own_name_says_where_the_name_behind_it_says_nothing(tmp_path):
    """The hub of Hugging Face keeps files under their digests and links to them."""
    blob = factories.write_tar(tmp_path / "0123abcd", [("a.jpg", PIXEL)])
    (tmp_path / "t.tar").symlink_to(blob)
    (unit,) = listed(tmp_path / "t.tar").units
    assert unit.container == str(tmp_path / "t.tar")
    assert [row.key for row in unit.rows] == ["a"]


def test_a_file_url_is_a_path(tmp_path):
    folder(tmp_path, "a.jpg")
    assert listed(f"file://{tmp_path}") == listed(tmp_path)


def test_a_signed_address_is_known_by_its_path():
    for name in ("t.tar?token=a/b.zip", "t.TGZ#x", "t.txt?x=1"):
        open_source(f"https://host/{name}")
    assert names.base_name("https://host/a/t.parquet?token=a/b.zip") == "t.parquet"
    assert names.parent("https://host/a/t.txt?token=a/b.zip") == "https://host/a"
