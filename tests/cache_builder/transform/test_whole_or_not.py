"""Nothing is taken from damage, and a run that was stopped goes on."""

import re

import pytest

from cache_builder.errors import (
    ArtifactError,
    CacheInUseError,
    ConfigError,
)
from cache_builder.formats import TokenCache
from cache_builder.formats.manifest import CacheManifest
from cache_builder.stores import open_store
from cache_builder.transform import (
    ConvertOptions,
    SubsetOptions,
)
from tests import factories
from tests.cache_builder.transform.support import LAYOUTS, OTHER, convert, subset


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_taken_from_a_damaged_shard(make, tmp_path, layout):
    cache = make(layout=layout)
    with TokenCache.open(cache) as opened:
        damaged = opened.manifest.shards[1].files[0].path
    factories.flip_byte(cache / damaged)
    message = rf"{re.escape(damaged)} has SHA-256 .*Nothing is taken from a damaged shard"
    with pytest.raises(ArtifactError, match=message):
        convert(ConvertOptions(str(cache), str(tmp_path / "out"), OTHER[layout]))
    with pytest.raises(ArtifactError, match="has not finished"):
        CacheManifest.load(tmp_path / "out")
    # Mended, the same command ends as if nothing had happened.
    factories.flip_byte(cache / damaged)
    convert(ConvertOptions(str(cache), str(tmp_path / "out"), OTHER[layout]))
    built = make("built", OTHER[layout])
    assert factories.contents(tmp_path / "out") == factories.contents(built)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("plan/000001.json", b'"label":0', b'"label":1', r"plan/ are not those of plan\.json"),
        ("plan/000001.json", b'{"key":"b/001"', b'{"key":"b/bad"', r"unit 1 plans"),
        ("skipped.jsonl", b"\n", b"", None),
        ("skipped.jsonl", b"}\n", b"\n", r"skipped\.jsonl: "),
    ],
)
def test_a_damaged_plan_is_refused(make, tmp_path, name, old, new, message):
    cache = make()
    data = (cache / name).read_bytes()
    assert old in data
    (cache / name).write_bytes(data.replace(old, new, 1))
    if message is None:  # a last line without its end is still that line
        convert(ConvertOptions(str(cache), str(tmp_path / "out"), "zarr"))
        return
    with pytest.raises(ArtifactError, match=message + r".*patchcache verify"):
        convert(ConvertOptions(str(cache), str(tmp_path / "out"), "zarr"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_was_stopped_anywhere_ends_with_the_bytes_of_one_that_was_not(
    make, tmp_path, layout
):
    cache, out = make(layout=layout), tmp_path / "out"
    built = make("built", OTHER[layout])
    options = ConvertOptions(str(cache), str(out), OTHER[layout])

    def stop(done, total):
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            convert(options, stop)
    record = out / "units/000000.json"
    before = record.stat().st_mtime_ns
    (out / "units" / ".000001.json.0123.tmp").write_bytes(b"half")
    assert convert(options).num_units_kept == 1
    assert record.stat().st_mtime_ns == before
    assert factories.contents(out) == factories.contents(built)
    # A finished unit that is damaged is filled again.
    with TokenCache.open(out) as opened:
        factories.flip_byte(out / opened.manifest.shards[1].files[0].path)
    assert convert(options).num_units_kept == 2
    assert factories.contents(out) == factories.contents(built)


def test_a_changed_command_is_refused_with_the_difference(make, tmp_path):
    cache, out = str(make()), str(tmp_path / "out")
    subset(SubsetOptions(cache, out, sample=3))
    with pytest.raises(ConfigError, match=r"source.num_samples: 3 there, 4 now"):
        subset(SubsetOptions(cache, out, sample=4))
    with pytest.raises(ConfigError, match="the list of images has changed"):
        subset(SubsetOptions(cache, out, sample=3, seed=1))
    with pytest.raises(ConfigError, match=r"layout: .webdataset. there, .zarr. now"):
        subset(SubsetOptions(cache, out, sample=3, layout="zarr"))
    with pytest.raises(ConfigError, match=r"is a cache that is read\. Choose another place"):
        convert(ConvertOptions(cache, f"{cache}/../cache", "zarr"))


def test_a_second_driver_is_refused(make, tmp_path):
    cache, out = str(make()), tmp_path / "out"
    with (
        open_store(out).lock("process 7 on earth"),
        pytest.raises(CacheInUseError, match="is being written by process 7 on earth"),
    ):
        convert(ConvertOptions(cache, str(out), "zarr"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_on_object_storage_are_converted_as_local_ones(make, tmp_path, bucket, layout):
    cache = make(layout=layout)
    there = f"{bucket}/caches/out"
    convert(ConvertOptions(str(cache), there, OTHER[layout]))
    store = open_store(there)
    built = make("built", OTHER[layout])
    assert {name: store.read(name) for name in store.names()} == factories.contents(built)
    convert(ConvertOptions(there, str(tmp_path / "back"), layout))
    assert factories.contents(tmp_path / "back") == factories.contents(cache)
