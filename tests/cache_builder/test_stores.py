"""A cache lies in a directory or on an object store, and a writer cannot tell the difference."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest

from cache_builder import object_store
from cache_builder.errors import CacheInUseError, ConfigError, StorageError
from cache_builder.files import sha256_bytes
from cache_builder.stores import (
    LocalStore,
    Measure,
    absolute_location,
    join_location,
    open_store,
    read_location,
)


@pytest.fixture(params=["local", "s3", "gs"])
def location(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "cache")
    bucket = {"s3": "bucket", "gs": "google_bucket"}[request.param]
    return request.getfixturevalue(bucket) + "/some/prefix"


@pytest.fixture
def store(location):
    return open_store(location)


def test_what_is_published_is_read_measured_and_listed(store):
    assert list(store.names()) == []
    store.publish("units/000000.json", b"first")
    store.publish("units/000000.json", b"second")
    store.publish("plan.json", b"")
    assert store.read("units/000000.json") == b"second"
    assert store.measure("units/000000.json") == Measure(6, sha256_bytes(b"second"))
    assert (store.size("units/000000.json"), store.size("plan.json")) == (6, 0)
    assert sorted(store.names()) == ["plan.json", "units/000000.json"]
    assert list(store.names("units")) == ["units/000000.json"]


def test_what_is_not_there_is_not_found(store):
    assert not store.exists("plan.json")
    for look in (store.read, store.measure, store.size, store.open):
        with pytest.raises(FileNotFoundError, match=re.escape("plan.json")):
            look("plan.json")
    store.remove("plan.json")


def test_a_name_longer_than_a_file_can_have_is_one_that_is_not_there(store):
    name = f"shards/{'0' * 2000}.tar"
    assert not store.exists(name)
    for ask in (store.read, store.size, store.measure):
        with pytest.raises(FileNotFoundError):
            ask(name)


def test_of_two_writers_of_a_new_file_one_wins(store):
    store.publish_new("plan.json", b"first")
    with pytest.raises(FileExistsError, match=re.escape("plan.json")):
        store.publish_new("plan.json", b"second")
    assert store.read("plan.json") == b"first"


def test_a_file_that_fails_half_way_never_appears(store):
    with pytest.raises(ZeroDivisionError), store.publishing("shards/000000.tar") as file:
        file.write(b"half")
        1 / 0  # noqa: B018
    assert list(store.names()) == []
    with store.publishing("shards/000000.tar") as file:
        file.write(b"whole" * 3_000_000)  # more than a part of a multipart upload
    assert store.size("shards/000000.tar") == 15_000_000


def test_a_file_is_read_in_any_order(store):
    content = os.urandom(9 << 20)
    store.publish("file", content)
    reader = store.open("file")
    places = [
        (0, 10),
        (10, 100),
        (5 << 20, 7),
        ((9 << 20) - 3, 10),
        (9 << 20, 5),
        (110, 20),
        (3, 2),
    ]
    for start, size in places:
        assert reader.read(start, size) == content[start : start + size]
    reader.close()


def test_reads_that_follow_one_another_share_requests(bucket, monkeypatch):
    store = open_store(bucket)
    store.publish("file", bytes(1 << 20))
    requests = []
    ask = object_store.ObjectStore.read_range
    monkeypatch.setattr(
        object_store.ObjectStore,
        "read_range",
        lambda self, *args: requests.append(args) or ask(self, *args),
    )
    reader = store.open("file")
    assert b"".join(reader.read(start, 1000) for start in range(0, 1 << 20, 1000)) == bytes(1 << 20)
    assert len(requests) == 1


def test_what_is_removed_is_gone(store):
    store.publish("file", b"x")
    store.remove("file")
    assert not store.exists("file")


def test_locations_are_joined_and_made_absolute(location):
    assert open_store(join_location(location, "targets")).location.endswith("/targets")
    assert absolute_location(location) == location
    store = open_store(location)
    store.publish("file", b"content")
    assert read_location(join_location(location, "file")) == b"content"


def test_a_second_driver_is_refused_by_name(store, monkeypatch):
    monkeypatch.setattr(object_store, "_BEAT_S", 0.2)
    with (
        store.lock("process 7 on host"),
        pytest.raises(CacheInUseError, match="is being written by process 7 on host"),
        open_store(store.location).lock("process 8"),
    ):
        pass
    assert list(store.names()) == []
    with store.lock("process 9"):
        pass


HOLD = """
import sys, time
from cache_builder import object_store
from cache_builder.stores import open_store
object_store._BEAT_S = 0.2
with open_store(sys.argv[1]).lock("a process that is killed"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_lives_on_for_as_long_as_it_is_held(location, monkeypatch, caplog):
    monkeypatch.setattr(object_store, "_BEAT_S", 0.05)
    monkeypatch.setattr(object_store, "_LOST_AFTER_S", 1.0)
    with open_store(location).lock("the first"):
        time.sleep(0.5)
        with pytest.raises(CacheInUseError), open_store(location).lock("the second"):
            pass
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_lock_of_a_driver_that_was_killed_is_taken(location, monkeypatch):
    monkeypatch.setattr(object_store, "_BEAT_S", 0.2)
    monkeypatch.setattr(object_store, "_LOST_AFTER_S", 1.0)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, location], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CacheInUseError), open_store(location).lock("too early"):
            pass
        holder.kill()
    with open_store(location).lock("its successor"):
        pass
    assert list(open_store(location).names()) == []


def test_a_directory_that_a_lock_made_goes_with_it(tmp_path):
    with LocalStore(tmp_path / "a").lock("me"):
        assert (tmp_path / "a").is_dir()
    assert not (tmp_path / "a").exists()


def test_drivers_that_come_and_go_at_once_find_the_lock_free_or_taken(tmp_path):
    store, outcomes = LocalStore(tmp_path / "cache"), []

    def come_and_go():
        for _ in range(400):
            try:
                with store.lock("a driver"):
                    outcomes.append(None)
            except (CacheInUseError, OSError) as exc:
                outcomes.append(type(exc))

    threads = [threading.Thread(target=come_and_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) == {None, CacheInUseError}


def test_a_file_in_the_place_of_a_cache_is_not_waited_for(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with (
        pytest.raises(FileExistsError, match="cache"),
        LocalStore(tmp_path / "cache").lock("a driver"),
    ):
        pass


def test_a_bucket_that_is_not_there_is_one_clear_error(bucket):
    with pytest.raises(StorageError, match=r"Cannot write s3://no-such-bucket/x/plan.json: there"):
        open_store("s3://no-such-bucket/x").publish("plan.json", b"")


def test_a_server_that_does_not_answer_is_one_clear_error(bucket, monkeypatch):
    monkeypatch.setattr(object_store, "_MAX_RETRIES", 1)
    monkeypatch.setattr(object_store, "_PAUSES_S", (0.0,))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"Cannot read s3://.*Check the network, the bucket"):
        open_store(bucket).read("plan.json")


def test_a_file_url_is_a_path_also_at_the_root(tmp_path, monkeypatch):
    (tmp_path / "no file of the root").write_bytes(b"content")
    assert read_location(f"file://{tmp_path}/no file of the root") == b"content"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_location("file:///no file of the root")


def test_a_place_that_cannot_hold_a_cache_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"not on ftp://. Choose another place than ftp://host"):
        open_store("ftp://host/cache")
    assert open_store(f"file://{tmp_path}").location == str(tmp_path)
