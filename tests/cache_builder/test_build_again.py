"""The same command again goes on with a build; another one is refused."""

import pytest

from cache_builder.errors import ConfigError, TokenizerMismatchError
from cache_builder.formats.manifest import UnitRecord
from cache_builder.stores import open_store
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.units import Target, build_unit
from tests import factories
from tests.cache_builder.builds import settings

LAYOUTS = ["webdataset", "zarr"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_finished_build_is_confirmed_and_not_done_again(
    tmp_path, codebook_path, photos_dir, layout
):
    options = settings(tmp_path, layout=layout)
    factories.build_cache(**options)
    before = factories.contents(tmp_path / "cache")
    plan = factories.plan_cache(**options)
    worker = factories.make_worker(options["out"], plan)
    assert all(worker.run(unit).was_there for unit in range(plan.num_units))
    assert factories.contents(tmp_path / "cache") == before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "record"])
def test_a_damaged_unit_is_built_again_and_the_others_are_kept(
    tmp_path, codebook_path, photos_dir, layout, damage
):
    options = settings(tmp_path, layout=layout)
    factories.build_cache(**options)
    cache = tmp_path / "cache"
    before = factories.contents(cache)
    record = factories.read(UnitRecord, cache, "units/000001.json")
    path = cache / record.files[0].path
    if damage == "flip":
        factories.flip_byte(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "remove":
        path.unlink()
    else:
        factories.flip_byte(cache / "units/000001.json", 0)
    plan = factories.plan_cache(**options)
    worker = factories.make_worker(cache, plan)
    reports = [worker.run(unit) for unit in range(plan.num_units)]
    assert [report.was_there for report in reports] == [True, False, True]
    factories.finish(cache)
    assert factories.contents(cache) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_killed_build_left_behind_is_used_or_swept(
    tmp_path, codebook_path, photos_dir, layout
):
    options = settings(tmp_path, layout=layout)
    factories.build_cache(**options)
    cache = tmp_path / "cache"
    before = factories.contents(cache)
    # Killed after the shard and before its record, in the middle of a record, of a tar, of a chunk.
    (cache / "manifest.json").unlink()
    (cache / "units/000001.json").unlink()
    for name in ("units/.000001.json.abc.tmp", "shards/.000001.tar.abc.tmp"):
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_bytes(b"half")
    if layout == "zarr":
        (cache / "tokens.zarr/tokens/c/1/0/0/0.0123abc.partial").write_bytes(b"half")
    else:
        (cache / "codebook.safetensors").unlink()
    factories.build_cache(**options)
    if layout == "zarr":
        (cache / "shards").rmdir()
    assert factories.contents(cache) == before


@pytest.mark.parametrize(
    "left", [["plan/000000.json"], [".plan.json.0123.tmp"], ["plan/.000001.json.0123.tmp"], []]
)
def test_a_driver_that_was_killed_before_its_plan_leaves_no_trace(
    tmp_path, codebook_path, photos_dir, left
):
    (tmp_path / "cache/plan").mkdir(parents=True)
    for name in left:
        (tmp_path / "cache" / name).write_bytes(b"half")
    factories.build_cache(**settings(tmp_path))
    factories.build_cache(**settings(tmp_path, out=tmp_path / "other"))
    assert factories.contents(tmp_path / "cache") == factories.contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"num_views": 2}, r"view_spec.num_views: 3 there, 2 now"),
        ({"seed": 7}, r"view_spec.seed: 0 there, 7 now"),
        ({"scale": (0.5, 1.0)}, r"view_spec.scale: \[0.2, 1.0\] there, \[0.5, 1.0\] now"),
        ({"layout": "zarr"}, r'layout: "webdataset" there, "zarr" now'),
        ({"images_in_cache": "none"}, r'images_in_cache: "original" there, "none" now'),
        ({"unit_size": 3}, r"unit_size: 2 there, 3 now"),
    ],
)
def test_other_settings_are_refused_and_the_difference_is_named(
    tmp_path, codebook_path, photos_dir, changes, difference
):
    factories.plan_cache(**settings(tmp_path))
    with pytest.raises(ConfigError, match=rf"other settings: .*{difference}.*first command again"):
        factories.plan_cache(**settings(tmp_path, **changes))


def test_other_images_are_refused(tmp_path, codebook_path, photos_dir):
    factories.plan_cache(**settings(tmp_path))
    (photos_dir / "a/000.jpg").rename(photos_dir / "a/999.jpg")
    with pytest.raises(ConfigError, match="the list of images has changed"):
        factories.plan_cache(**settings(tmp_path))
    (photos_dir / "a/999.jpg").unlink()
    with pytest.raises(ConfigError, match=r"source.num_samples: 5 there, 4 now"):
        factories.plan_cache(**settings(tmp_path))


def test_another_codebook_is_refused_by_both_fingerprints(tmp_path, codebook_path, photos_dir):
    factories.plan_cache(**settings(tmp_path))
    ours = factories.colour_codebook().fingerprint
    other = factories.colour_codebook(colours=factories.COLOURS[:5])
    other.save(codebook_path)
    with pytest.raises(TokenizerMismatchError, match=f"{ours}.*{other.fingerprint}"):
        factories.plan_cache(**settings(tmp_path))


def test_a_unit_is_not_built_by_another_tokenizer_than_the_planned_one(
    tmp_path, codebook_path, photos_dir
):
    plan = factories.plan_cache(**settings(tmp_path))
    other = PatchTokenizer.load(factories.colour_codebook(colours=factories.COLOURS[:5]))
    with pytest.raises(
        TokenizerMismatchError, match=f"{plan.spec.fingerprint}.*{other.fingerprint}"
    ):
        build_unit([Target(open_store(tmp_path / "cache"), plan, other)], 0, iter(()))


@pytest.mark.parametrize("name", ["notes.txt", "plan/notes.txt", "manifest.json"])
def test_a_folder_that_holds_something_else_is_left_alone(
    tmp_path, codebook_path, photos_dir, name
):
    foreign = factories.write_folder(tmp_path / "cache", {name: b"mine"}) / name
    with pytest.raises(ConfigError, match=r"is not empty and holds no plan.json. Choose another"):
        factories.plan_cache(**settings(tmp_path))
    assert foreign.read_bytes() == b"mine"
