"""A cache on object storage is the same cache, also when the network and the server fail."""

import io
import itertools
import random
import re
import tarfile

import pytest

from cache_builder import object_store
from cache_builder.errors import CacheInUseError, StorageError
from cache_builder.stores import open_store
from tests.integration import builds
from tests.integration.proxy import FAILURES, Proxy, at_random

LAYOUTS = ["webdataset", "zarr"]


@pytest.fixture
def proxy(bucket, s3_server, monkeypatch):
    """Between every client and the server."""
    proxy = Proxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.stop()


@pytest.fixture
def quick(monkeypatch):
    """Clients that wait for a moment only."""
    monkeypatch.setattr(object_store, "_MAX_RETRIES", 1)
    monkeypatch.setattr(object_store, "_PAUSES_S", (0.0,))
    monkeypatch.setattr(object_store, "_BEAT_S", 0.2)
    monkeypatch.setattr(object_store, "_LOST_AFTER_S", 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zarr"])
def test_a_build_whose_requests_fail_now_and_then_gives_the_bytes_of_a_local_one(
    bucket, proxy, inputs, undisturbed, layout
):
    images, codebooks = inputs
    options = builds.options_of(images, codebooks, f"{bucket}/cache", layout=layout)
    with proxy.failing(at_random(seed=len(layout), share=0.1)) as failed:
        builds.build_here(options)
    assert {how for how, _, _ in failed} == set(FAILURES)
    builds.assert_same(options.out, undisturbed(layout))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["webdataset"])
@pytest.mark.usefixtures("quick")
def test_a_server_that_is_gone_ends_a_build_in_one_line_and_the_build_goes_on_when_it_is_back(
    bucket, proxy, inputs, undisturbed, layout
):
    images, codebooks = inputs
    options = builds.options_of(images, codebooks, f"{bucket}/cache", layout=layout)
    expected = undisturbed(layout)
    rng = random.Random(layout)
    for failure in (*FAILURES, "busy"):
        left = rng.randrange(1, 100)

        def choose(method, path, failure=failure):
            nonlocal left
            left -= 1
            return failure if left < 0 else None

        with proxy.failing(choose), pytest.raises(StorageError) as refused:
            builds.build_here(options)
        line = str(refused.value)
        assert "\n" not in line
        assert re.search(rf"Cannot \w+ {bucket}/cache\S*: .*run the same command again", line)
        there = builds.contents(options.out)
        there.pop(".lock", None)
        assert [name for name, data in there.items() if data != expected.get(name)] == []
        assert "manifest.json" not in there
    builds.build_here(options)
    builds.assert_same(options.out, expected)


@pytest.mark.parametrize("how", FAILURES)
def test_what_is_written_once_is_written_once_when_the_answer_is_lost(bucket, proxy, how):
    store = open_store(bucket)
    once = iter([how])
    with proxy.failing(lambda method, path: next(once, None)) as failed:
        store.publish_new("plan.json", b"mine")
    assert len(failed) == 1
    assert store.read("plan.json") == b"mine"
    with pytest.raises(FileExistsError):
        store.publish_new("plan.json", b"another")


@pytest.mark.usefixtures("quick")
def test_a_listing_that_breaks_off_goes_on_where_it_was(bucket, proxy):
    store = open_store(bucket)
    names = [f"units/{number:06d}.json" for number in range(20)]
    for name in names:
        store.publish(name, b"x")
    listing = store.names()
    once = iter(["cut"])
    with proxy.failing(lambda method, path: next(once, None)) as failed:
        assert sorted(listing) == names
    assert len(failed) == 1


@pytest.mark.usefixtures("quick")
def test_a_lock_is_kept_over_lost_answers_and_keeps_others_out(bucket, proxy):
    # A write whose answer is lost is repeated, and refused because it has been done already.
    turns = itertools.cycle(["lose", None])
    with (
        proxy.failing(lambda method, path: next(turns) if method == "PUT" else None) as failed,
        open_store(bucket).lock("the first"),
    ):
        builds.wait_for(lambda: len(failed) > 3)
        with (
            pytest.raises(CacheInUseError, match="the first"),
            open_store(bucket).lock("the second"),
        ):
            pass
    assert list(open_store(bucket).names()) == []


@pytest.mark.usefixtures("quick")
def test_a_driver_whose_lock_was_taken_leaves_it_to_the_other(bucket, caplog):
    store, other = open_store(bucket), open_store(bucket)
    with store.lock("suspended for long"):
        other.publish(".lock", b'{"holder": "its successor", "token": "", "beat": 1}')
        lease_lost = "another driver has taken the lock"
        builds.wait_for(lambda: lease_lost in caplog.text)
    assert b"its successor" in other.read(".lock")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_finished_shard_is_known_by_its_digest_and_not_by_being_there(
    request, tmp_path, inputs, undisturbed, layout, place
):
    images, codebooks = inputs
    out = tmp_path / "cache" if place == "local" else request.getfixturevalue("bucket") + "/cache"
    options = builds.options_of(images, codebooks, out, layout=layout)
    store, expected = open_store(out), undisturbed(layout)
    for name, data in expected.items():
        store.publish(name, data)
    # Right in name and size, in the cache and in its layer; one that a reader would open, too.
    damaged = [
        name
        for name in expected
        if re.search(r"shards/000003\.tar|(tokens|keys)/c/3(/|$)|images/000003/c", name)
    ]
    assert len(damaged) >= 2
    assert any(name.startswith("targets/") for name in damaged)
    for name in damaged:
        store.publish(name, of_another_unit(expected, name))
    builds.build_here(options)
    builds.assert_same(out, expected)


def of_another_unit(expected, name):
    """Return bytes as long as the file's, that differ from it."""
    data = expected[name]
    if name.endswith(".tar"):
        # A whole tar of the same names and sizes, every byte of content another one.
        swapped = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(data)) as old,
            tarfile.open(fileobj=swapped, mode="w", format=tarfile.GNU_FORMAT) as new,
        ):
            for member in old:
                content = old.extractfile(member).read()
                new.addfile(member, io.BytesIO(bytes(byte ^ 1 for byte in content)))
        assert len(swapped.getvalue()) == len(data)
        return swapped.getvalue()
    return bytes(byte ^ 1 for byte in data)
