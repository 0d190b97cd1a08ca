"""The images of a cache that holds none are found by key, wherever they lie."""

from pathlib import Path

import pytest

from cache_builder.errors import SourceError
from cache_builder.sources import ImageJoin
from cache_builder.stores import open_store
from tests import factories
from tests.listings import folder

PIXEL = b"content is not looked at by a source"


@pytest.fixture
def planned(tmp_path, codebook_path):
    """Plan a cache without images; return its folder and what joins it to its source."""

    def plan(images):
        out = tmp_path / "cache"
        written = factories.plan_cache(images=str(images), codebook=codebook_path, out=out)
        return open_store(out), written.spec.source

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
    with pytest.raises(SourceError, match=r"0\.tar cannot be opened: No such file"):
        ImageJoin(cache, info).read(0, "0")
    for place in ("moved", "moved/{0..1}.tar"):
        assert ImageJoin(cache, info, str(tmp_path / place)).read(1, "1") == b"1"


def test_tars_that_have_moved_to_several_folders_are_found_by_name(tmp_path, planned):
    (tmp_path / "tars").mkdir()
    for i in range(2):
        factories.write_tar(tmp_path / f"tars/{i}.tar", [(f"{i}.jpg", b"%d" % i)])
    cache, info = planned(tmp_path / "tars")
    for i in range(2):
        (tmp_path / f"new{i}").mkdir()
        (tmp_path / f"tars/{i}.tar").rename(tmp_path / f"new{i}/{i}.tar")
    join = ImageJoin(cache, info, f"{tmp_path}/{{new0/0,new1/1}}.tar")
    assert [join.read(i, str(i)) for i in (0, 1)] == [b"0", b"1"]


@pytest.mark.parametrize(("name", "key"), [("t.tar", "a"), ("t.txt", "b")])
def test_a_moved_list_or_tar_may_be_named_from_its_own_folder(
    tmp_path, planned, monkeypatch, name, key
):
    (tmp_path / "old").mkdir()
    factories.write_tar(tmp_path / "old/t.tar", [("a.jpg", b"a")])
    (tmp_path / "old/t.txt").write_text("b.jpg\n")
    (tmp_path / "old/b.jpg").write_bytes(b"b")
    cache, info = planned(tmp_path / "old" / name)
    (tmp_path / "old").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert ImageJoin(cache, info, name).read(0, key) == key.encode()


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
