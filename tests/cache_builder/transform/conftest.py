"""Caches that tests of convert, merge and subset begin with."""

import pytest

from tests import factories


@pytest.fixture
def make(tmp_path, codebook_path):
    """Build a cache of seven photographs and a bad image in units of three."""
    content = factories.photo_images(7) | {"b/bad.jpg": b"text"}
    factories.write_folder(tmp_path / "images", content)

    def build_it(name="cache", layout="webdataset", **changes):
        settings = {
            "images": str(tmp_path / "images"),
            "codebook": codebook_path,
            "num_views": 2,
            "unit_size": 3,
            "resized_short_side": 20,
        } | changes
        factories.build_cache(out=tmp_path / name, layout=layout, **settings)
        return tmp_path / name

    return build_it


@pytest.fixture
def two_caches(tmp_path, codebook_path):
    """Build caches of two folders: classes a and b, and classes b and c."""

    def build_them(first=None, second=None, **settings):
        content = factories.photo_images(6)
        for name, classes, changes in (("first", "ab", first), ("second", "bc", second)):
            some = {
                f"{classes['ab'.index(path[0])]}/{name}{path[2:]}": data
                for path, data in content.items()
            }
            images = factories.write_folder(tmp_path / f"{name} images", some)
            options = {"num_views": 2, "unit_size": 4, "codebook": codebook_path} | settings
            options |= {"images": str(images), "out": tmp_path / name} | (changes or {})
            factories.build_cache(**options)
        return str(tmp_path / "first"), str(tmp_path / "second")

    return build_them
