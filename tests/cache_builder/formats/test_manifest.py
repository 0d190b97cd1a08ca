"""A manifest is there when the build has finished, and says everything that a reader needs."""

import pytest

from cache_builder.errors import ArtifactError, FormatVersionError
from cache_builder.formats import CacheManifest
from cache_builder.formats.manifest import FileDigest, UnitRecord, to_json, unit_record_name
from cache_builder.formats.plan import PlanUnit, plan_unit_name
from cache_builder.stores import open_store
from tests import factories


@pytest.fixture
def cache(tmp_path, codebook_path):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(5))
    factories.build_cache(
        images=str(images), codebook=codebook_path, out=tmp_path / "cache", unit_size=2, num_views=3
    )
    return tmp_path / "cache"


def test_an_unfinished_build_is_refused_and_says_how_to_resume(cache):
    (cache / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"build has not finished.*it resumes"):
        CacheManifest.load(cache)


def test_another_folder_is_not_a_cache(tmp_path):
    with pytest.raises(ArtifactError, match=r"is not a cache: .*Pass the directory"):
        CacheManifest.load(tmp_path)


def test_the_manifest_holds_what_a_reader_needs(cache):
    manifest = CacheManifest.load(cache)
    assert manifest.num_samples == 5
    assert manifest.num_skipped == 0
    assert [(s.name, s.num_samples) for s in manifest.shards] == [
        ("000000", 2),
        ("000001", 2),
        ("000002", 1),
    ]
    assert manifest.fingerprint == factories.colour_codebook().fingerprint
    assert (manifest.grid, manifest.vocab_size) == ((4, 4), 6)
    assert manifest.view_spec.num_views == 3
    assert manifest.payloads == ("tokens", "views", "image")
    assert manifest.spec.class_names == ("a", "b")
    assert manifest.spec.tokens_shape == (3, 4, 4)
    assert manifest.bytes == sum(p.stat().st_size for p in (cache / "shards").iterdir())
    assert manifest.shards[0].sha256 == FileDigest.of(open_store(cache), "shards/000000.tar").sha256


def test_a_newer_manifest_is_refused_and_says_how_to_upgrade(cache):
    path = cache / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version":1', b'"format_version":2'))
    with pytest.raises(FormatVersionError, match=r"version 2.*Upgrade"):
        CacheManifest.load(cache)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"format_version":"x"}', b'{"format_version":1}', b"\xff\xfe"],
)
def test_a_damaged_manifest_is_refused(cache, content):
    (cache / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        CacheManifest.load(cache)


def test_an_unknown_field_is_refused(cache):
    path = cache / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"num_samples"', b'"num_sample"', 1))
    with pytest.raises(ArtifactError, match="num_sample"):
        CacheManifest.load(cache)


def test_what_is_written_is_read_and_written_again(cache):
    for model, name in (
        (CacheManifest, "manifest.json"),
        (UnitRecord, unit_record_name(1)),
        (PlanUnit, plan_unit_name(1)),
    ):
        assert to_json(factories.read(model, cache, name)) == (cache / name).read_bytes()


def test_a_missing_record_says_which_command_makes_it(cache):
    (cache / unit_record_name(1)).unlink()
    with pytest.raises(ArtifactError, match=r"000001.json is missing.*patchcache build"):
        factories.read(UnitRecord, cache, unit_record_name(1))


def test_a_file_digest_names_each_kind_of_damage(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    store = open_store(tmp_path)
    digest = FileDigest.of(store, path.name)
    assert digest.damage(store) is None
    path.write_bytes(b"abd")
    assert "has SHA-256" in digest.damage(store)
    path.write_bytes(b"ab")
    assert "has 2 bytes, expected 3" in digest.damage(store)
    path.unlink()
    assert "is missing" in digest.damage(store)
