"""`verify --repair` makes a damaged cache the one that it was, byte for byte, or says why not."""

import random
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from cache_builder import unit_checks
from cache_builder.errors import ArtifactError, CacheInUseError, TokenizerMismatchError
from cache_builder.formats.manifest import CacheManifest, UnitRecord, to_json
from cache_builder.formats.plan import BuildPlan
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.stores import open_store
from cache_builder.verify import run as verify
from tests import factories
from tests.cache_builder.damages import build, cut, flip, kinds_of_files, remove

LAYOUTS = ["webdataset", "zarr"]
FLIPS = 25


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished cache of every layout, its images and its codebooks."""
    root = tmp_path_factory.mktemp("finished")
    for layout in LAYOUTS:
        build(root, root / layout, layout)
    return root


@pytest.fixture(params=LAYOUTS)
def cache(request, finished, tmp_path):
    """A copy of a finished cache, to be damaged."""
    return shutil.copytree(finished / request.param, tmp_path / "cache")


@pytest.fixture
def tars(finished, tmp_path):
    """A copy of a cache of tars, to be damaged."""
    return shutil.copytree(finished / "webdataset", tmp_path / "cache")


def check(cache, **options):
    return verify(cache, device="cpu", **options)


DAMAGES = [flip, cut, remove]


@pytest.mark.parametrize(("layout", "turn"), [("webdataset", 0), ("webdataset", 1), ("zarr", 2)])
def test_a_damaged_file_of_any_kind_is_named_and_made_again(finished, tmp_path, layout, turn):
    cache = shutil.copytree(finished / layout, tmp_path / "cache")
    before = factories.contents(cache)
    for number, (what, name) in enumerate(kinds_of_files(cache).items(), turn):
        DAMAGES[number % 3](cache / name)
        found = check(cache)
        assert {item.file for item in found.damages} == {name}, what
        assert all(str(cache / name) in item.detail for item in found.damages), what
        codebook = finished / ("two.safetensors" if "layer" in what else "one.safetensors")
        report = check(cache, repair=True, codebook=codebook)
        assert (report.problems, report.refused, report.repaired) == ([], [], [name]), what
        assert factories.contents(cache) == before, what


def test_every_flipped_bit_is_found_and_named(cache):
    rng = random.Random(5)
    names = sorted(name for name, data in factories.contents(cache).items() if data)
    for _ in range(FLIPS):
        path = cache / rng.choice(names)
        before = path.read_bytes()
        data = bytearray(before)
        position, bit = rng.randrange(len(data)), rng.randrange(8)
        data[position] ^= 1 << bit
        path.write_bytes(data)
        found = {str(cache / damage.file) for damage in check(cache).damages}
        assert found == {str(path)}, (position, bit)
        path.write_bytes(before)


def test_many_damages_at_once_are_repaired_in_one_run(cache, finished):
    before = factories.contents(cache)
    files = kinds_of_files(cache)
    for what in ("plan unit", "plan", "record", "layer's shard", "layer's manifest", "shard"):
        remove(cache / files[what])
    for what in ("codebook", "skipped list"):
        flip(cache / files[what])
    report = check(cache, repair=True, codebook=finished / "one.safetensors")
    assert (report.problems, report.refused) == ([], [])
    assert factories.contents(cache) == before


def test_what_is_whole_is_not_written_again(cache):
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    name = kinds_of_files(cache)["shard"]
    flip(cache / name)
    check(cache, repair=True)
    changed = [path for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == [cache / name]


def test_a_whole_cache_is_not_touched_by_a_repair(cache):
    before = factories.contents(cache)
    report = check(cache, repair=True)
    assert (report.problems, report.repaired, report.refused) == ([], [], [])
    assert factories.contents(cache) == before


def test_a_wrong_digit_in_the_manifest_is_not_blamed_on_the_file_that_it_digests(tars):
    manifest = tars / "manifest.json"
    shard = CacheManifest.load(tars).shards[0]
    before = manifest.read_bytes()
    for digest in (shard.files[0].sha256, shard.record.sha256):
        wrong = ("0" if digest[0] != "0" else "1") + digest[1:]
        manifest.write_bytes(before.replace(digest.encode(), wrong.encode()))
        (damage,) = check(tars).damages
        assert damage.file == "manifest.json"
        assert f'is "{wrong}", not "{digest}"' in damage.detail
        check(tars, repair=True)
        assert manifest.read_bytes() == before


def test_wrong_tokens_with_right_digests_are_made_again(tars):
    before = factories.contents(tars)
    other = factories.contents(build(tars.parent, tars.parent / "other", seed=3))
    for name in ("shards/000000.tar", "units/000000.json"):
        (tars / name).write_bytes(other[name])
    record = factories.read(UnitRecord, tars, "units/000000.json")
    factories.rewrite_record(tars, 0, record)
    damages = check(tars).damages
    assert {(d.kind, d.unit, d.file) for d in damages} == {("content", 0, "shards/000000.tar")}
    assert "are not those of its key" in damages[0].detail
    report = check(tars, repair=True)
    assert (report.problems, report.refused) == ([], [])
    # The images of the two builds lie in two places.
    assert factories.contents(tars) == before


def test_without_its_source_a_unit_stays_as_it_is_and_the_rest_is_repaired(finished, tmp_path):
    cache = build(tmp_path, tmp_path / "cache")
    (tmp_path / "images").rename(tmp_path / "moved")
    before = factories.contents(cache)
    flip(cache / "shards/000001.tar")
    remove(cache / "plan/000002.json")
    remove(cache / "skipped.jsonl")
    damaged = factories.contents(cache)
    report = check(cache, repair=True)
    assert {damage.file for damage in report.damages} == {"shards/000001.tar", "plan/000002.json"}
    assert report.repaired == ["skipped.jsonl"]
    plan, unit = report.refused
    assert re.search(r"plan cannot be written again .*images.* --images names the place", plan)
    assert re.search(r"unit 1: .*images.* is not there", unit)
    assert factories.contents(cache) == damaged | {"skipped.jsonl": before["skipped.jsonl"]}
    report = check(cache, repair=True, images=str(tmp_path / "moved"))
    assert (report.problems, report.refused) == ([], [])
    assert factories.contents(cache) == before


def test_a_layer_is_repaired_from_the_images_in_the_cache_without_the_source(tmp_path):
    cache = build(tmp_path, tmp_path / "cache")
    shutil.rmtree(tmp_path / "images")
    before = factories.contents(cache)
    flip(cache / kinds_of_files(cache)["layer's shard"])
    report = check(cache, repair=True)
    assert (report.problems, report.refused) == ([], [])
    assert factories.contents(cache) == before


def test_images_that_have_changed_are_refused_and_nothing_is_made_worse(tmp_path):
    cache = build(tmp_path, tmp_path / "cache")
    flip(cache / "shards/000000.tar")
    damaged = factories.contents(cache)
    other = factories.encode(factories.draw_photo(99), "JPEG")
    (tmp_path / "images/a/000.jpg").write_bytes(other)
    report = check(cache, repair=True)
    assert [damage.file for damage in report.damages] == ["shards/000000.tar"]
    (reason,) = report.refused
    assert re.search(r"unit 000000, built again, is not what it was: its images have", reason)
    assert factories.contents(cache) == damaged


def test_a_source_with_another_image_cannot_list_the_plan_again(tmp_path):
    cache = build(tmp_path, tmp_path / "cache")
    remove(cache / "plan/000001.json")
    damaged = factories.contents(cache)
    shutil.copy(tmp_path / "images/a/000.jpg", tmp_path / "images/a/more.jpg")
    report = check(cache, repair=True)
    assert [damage.file for damage in report.damages] == ["plan/000001.json"]
    assert re.search(r"images of .* are not those that the cache was planned", report.refused[0])
    assert factories.contents(cache) == damaged


@pytest.mark.parametrize("images_in_cache", ["original", "none"])
def test_tars_that_have_moved_are_read_where_they_lie_now(tmp_path, images_in_cache):
    photos = factories.photo_images(5)
    (tmp_path / "tars").mkdir()
    for number in range(2):
        members = [(name, data) for name, data in photos.items() if int(name[2:5]) % 2 == number]
        factories.write_tar(tmp_path / f"tars/{number}.tar", members)
    settings = {"images": f"{tmp_path}/tars/{{0..1}}.tar", "images_in_cache": images_in_cache}
    cache = build(tmp_path, tmp_path / "cache", **settings)
    before = factories.contents(cache)
    (tmp_path / "tars").rename(tmp_path / "moved")
    files = kinds_of_files(cache)
    for what in ("plan unit", "shard", "layer's shard"):
        flip(cache / files[what])
    for place in ("moved", "moved/{0..1}.tar"):
        report = check(cache, repair=True, images=f"{tmp_path}/{place}")
        assert (report.problems, report.refused) == ([], [])
        assert factories.contents(cache) == before


@pytest.mark.parametrize("unit_size", [None, 3, 700])
def test_a_plan_of_large_row_groups_is_written_again(tmp_path, codebook_path, unit_size):
    small = factories.encode(factories.draw_patches(factories.random_ids(0)))
    images = tmp_path / "images"
    images.mkdir()
    for name, sizes in (("a", [1100, 500, 500, 60]), ("b", [5, 2, 2]), ("c", [0])):
        schema = pa.schema([("image", pa.binary())])
        with parquet.ParquetWriter(images / f"{name}.parquet", schema) as writer:
            for size in sizes:
                writer.write_table(pa.table({"image": [small] * size}, schema))
    settings = {"images": str(images), "codebook": codebook_path, "images_in_cache": "none"}
    cache = tmp_path / "cache"
    manifest = factories.build_cache(out=cache, unit_size=unit_size, **settings)
    assert manifest.spec.unit_size == 1152
    before = factories.contents(cache)
    flip(cache / "plan/000001.json")
    remove(cache / "plan/000002.json")
    flip(cache / "units/000000.json")
    report = check(cache, repair=True)
    assert (report.problems, report.refused) == ([], [])
    assert factories.contents(cache) == before


def test_a_codebook_without_a_copy_is_refused_by_its_fingerprint(tars, finished):
    remove(tars / "codebook.safetensors")
    flip(tars / "shards/000000.tar")
    damaged = factories.contents(tars)
    report = check(tars, repair=True, codebook=finished / "two.safetensors")
    codebook, unit = report.refused
    fingerprint = CacheManifest.load(tars).fingerprint
    assert codebook.endswith(f"--codebook names one, of tokenizer {fingerprint}")
    assert unit == "unit 0 needs the codebook of its tokenizer"
    assert factories.contents(tars) == damaged


def test_settings_that_nothing_else_tells_are_left_to_the_user(tars):
    before = factories.contents(tars)
    for layer in CacheManifest.load(tars).layers:
        shutil.rmtree(tars / layer.name)
    plan = factories.read(BuildPlan, tars, "plan.json").model_copy(update={"layers": ()})
    alone = plan.spec.model_copy(update={"jpeg_quality": 93})
    (tars / "plan.json").write_bytes(to_json(plan))
    manifest = CacheManifest.load(tars).model_copy(update={"layers": ()})
    (tars / "manifest.json").write_bytes(to_json(manifest))
    assert check(tars).problems == []
    (tars / "plan.json").write_bytes(to_json(plan.model_copy(update={"spec": alone})))
    damaged = factories.contents(tars)
    report = check(tars, repair=True)
    (damage,) = report.damages
    assert damage.kind == "contradicts"
    assert re.search(r"jpeg_quality is 93, not 92.*remove the wrong one of the two", damage.detail)
    assert factories.contents(tars) == damaged
    remove(tars / "plan.json")
    assert check(tars, repair=True).problems == []
    assert (tars / "plan.json").read_bytes() == to_json(plan)
    assert factories.contents(tars)["shards/000000.tar"] == before["shards/000000.tar"]


def test_a_cache_without_plan_and_manifest_is_explained(tars):
    (tars / "plan.json").write_bytes(b"{")
    (tars / "manifest.json").write_bytes(b"{")
    with pytest.raises(ArtifactError, match=r"Neither .*Build it again into an empty place"):
        check(tars, repair=True)


def test_an_unfinished_build_is_refused_and_one_that_lacks_its_manifest_alone_is_finished(cache):
    before = factories.contents(cache)
    remove(cache / "manifest.json")
    assert [damage.file for damage in check(cache).damages] == ["manifest.json"]
    assert check(cache, repair=True).problems == []
    assert factories.contents(cache) == before
    remove(cache / "manifest.json")
    remove(cache / "units/000001.json")
    with pytest.raises(ArtifactError, match="build has not finished"):
        check(cache, repair=True)


def test_files_that_nothing_names_are_noted_and_left_alone(cache):
    for name in ("units/000003.json", "shards/000003.tar", "notes.txt", "plan/.x.0f.tmp"):
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_bytes(b"text")
    report = check(cache, repair=True)
    assert report.problems == []
    assert report.notes == [
        f"nothing names {cache / name}"
        for name in ("notes.txt", "plan/.x.0f.tmp", "shards/000003.tar", "units/000003.json")
    ]
    assert (cache / "notes.txt").exists()


def test_two_keys_with_one_hash_are_not_one_key(tars, monkeypatch):
    monkeypatch.setattr(unit_checks, "hash_keys", lambda keys: np.zeros(len(keys), np.uint64))
    assert check(tars).problems == []


def test_a_repair_waits_for_no_other_driver(tars):
    with (
        open_store(tars).lock("process 7 on elsewhere"),
        pytest.raises(CacheInUseError, match="process 7 on elsewhere"),
    ):
        check(tars, repair=True)


def test_each_tokenizer_of_a_cache_tokenises_again(cache):
    manifest = CacheManifest.load(cache)
    first, second = manifest.fingerprint, manifest.layers[0].fingerprint
    report = check(cache, retokenize=9)
    assert [*report.retokenized] == [first, second]
    assert all(again[:4] == (5, 160, 0, 0) for again in report.retokenized.values())
    assert [*check(cache, retokenize=1, tokenizer=second[:6]).retokenized] == [second]
    with pytest.raises(TokenizerMismatchError, match="names none of them"):
        check(cache, retokenize=1, tokenizer="x")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_on_an_object_store_is_verified_and_repaired_there(
    bucket, finished, tmp_path, layout
):
    store = open_store(f"{bucket}/cache")
    before = factories.contents(finished / layout)
    for name, data in before.items():
        store.publish(name, data)
    assert check(f"{bucket}/cache", retokenize=2).problems == []
    files = kinds_of_files(finished / layout)
    for what in ("shard", "plan", "layer's record"):
        store.publish(files[what], before[files[what]][:-1])
    store.remove(files["skipped list"])
    report = check(f"{bucket}/cache")
    assert {damage.file for damage in report.damages} == {
        files[what] for what in ("shard", "plan", "layer's record", "skipped list")
    }
    assert all(f"{bucket}/cache" in problem for problem in report.problems)
    report = check(f"{bucket}/cache", repair=True)
    assert (report.problems, report.refused) == ([], [])
    assert {name: store.read(name) for name in store.names()} == before


@pytest.mark.ray
def test_units_are_checked_and_repaired_by_workers_of_a_cluster(ray_cluster, finished, tmp_path):
    images = factories.write_folder(tmp_path / "photos", factories.photo_images(18))
    cache = build(finished, tmp_path / "cache", images=str(images), unit_size=1)
    before = factories.contents(cache)
    files = kinds_of_files(cache)
    named = [files["shard"], files["layer's record"], "shards/000004.tar", "units/000007.json"]
    for name in named:
        flip(cache / name)
    report = check(cache, cluster=ClusterOptions(num_workers=2), repair=True)
    assert (report.problems, report.refused) == ([], [])
    assert sorted(report.repaired) == sorted(named)
    assert factories.contents(cache) == before
