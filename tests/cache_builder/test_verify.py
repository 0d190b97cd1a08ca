"""`verify` finds nothing in a whole cache, and names every kind of damage in another."""

import re
import shutil

import numpy as np
import pytest

from cache_builder.cache_check import CacheCheck
from cache_builder.errors import ArtifactError, SourceError
from cache_builder.formats import TokenCache
from cache_builder.formats.manifest import (
    UnitRecord,
    unit_record_name,
)
from cache_builder.formats.sample import NewSample
from cache_builder.formats.shards import ShardWriter
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.retokenize import Retokenized
from cache_builder.stores import open_store
from cache_builder.unit_checks import PartFinding
from cache_builder.verify import run as verify
from tests import factories

LAYOUTS = ["webdataset", "zarr"]


@pytest.fixture
def make(tmp_path, codebook_path):
    """Build a cache of five photographs and one bad image, in three units."""

    def build(layout="webdataset", **changes):
        content = factories.photo_images(5) | {"b/bad.jpg": b"text"}
        images = factories.write_folder(tmp_path / "images", content)
        settings = {"images": str(images), "unit_size": 2, "num_views": 2} | changes
        out = tmp_path / "cache"
        factories.build_cache(codebook=codebook_path, out=out, layout=layout, **settings)
        return out

    return build


def problems(cache, **options):
    return verify(cache, device="cpu", **options).problems


def rewrite_unit(cache_dir, unit, change):
    """Write a unit again with changed samples, and every digest to match."""
    with TokenCache.open(cache_dir) as cache:
        samples = [change(sample) for sample in cache.read_shard(unit)]
    new = [NewSample(sample, "jpg", f"{sample.key}.jpg", (48, 64)) for sample in samples]
    with ShardWriter(open_store(cache_dir), unit) as writer:
        for sample in new:
            writer.add(sample)
        written = writer.finish()
    record = factories.read(UnitRecord, cache_dir, unit_record_name(unit))
    changes = {"num_samples": len(new), "files": written.files, "samples": written.samples}
    factories.rewrite_record(cache_dir, unit, record.model_copy(update=changes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images_in_cache", ["original", "resized", "none"])
def test_a_whole_cache_has_no_problem_and_the_same_tokens_again(make, layout, images_in_cache):
    cache = make(layout, images_in_cache=images_in_cache, resized_short_side=24)
    told = []
    report = verify(cache, retokenize=100, device="cpu", progress=lambda *step: told.append(step))
    assert report.problems == []
    assert (report.num_samples, report.num_skipped) == (5, 1)
    (again,) = report.retokenized.values()
    assert again == Retokenized(5, 5 * 2 * 16, 0, 0)
    assert (report.notes, report.repaired, report.refused) == ([], [], [])
    assert told == [(1, 3), (2, 3), (3, 3)]
    # The codebook, the metadata of a Zarr group, and of each unit its files and its record.
    with TokenCache.open(cache) as opened:
        manifest = opened.manifest
    num_files = sum(len(shard.files) + 1 for shard in manifest.shards)
    assert report.num_files == 1 + len(manifest.store_files) + num_files


def test_a_sample_of_the_images_is_the_same_on_every_run(make):
    cache = make()
    reports = [verify(cache, retokenize=2, device="cpu") for _ in range(2)]
    assert reports[0] == reports[1]
    (again,) = reports[0].retokenized.values()
    assert again.num_images == 2
    assert verify(cache, device="cpu").retokenized == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_flipped_byte_of_a_shard_is_found(make, layout):
    cache = make(layout)
    with TokenCache.open(cache) as opened:
        paths = [file.path for file in opened.manifest.shards[1].files]
    for path in paths:
        factories.flip_byte(cache / path)
        (problem,) = problems(cache)
        assert problem.startswith(f"unit 1: {cache / path} has SHA-256 ")
        factories.flip_byte(cache / path)
    assert problems(cache) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shards/000001.tar", r"unit 1: .*000001.tar is missing"),
        ("units/000002.json", r"unit 2: .*units/000002.json is missing"),
        ("plan/000000.json", r"plan/000000.json is missing"),
        ("codebook.safetensors", r"codebook.safetensors is missing"),
        ("skipped.jsonl", r"skipped.jsonl is missing"),
        ("plan.json", r"plan.json is missing"),
    ],
)
def test_a_missing_file_is_named(make, name, expected):
    cache = make()
    (cache / name).unlink()
    found = problems(cache, retokenize=5)
    assert found
    assert any(re.search(expected, problem) for problem in found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("units/000001.json", "unit 1: .*units/000001.json has SHA-256"),
        ("plan/000001.json", "plan/000001.json is not the plan of its samples: keys do not match"),
        ("skipped.jsonl", "does not list the skipped images of the commit records"),
    ],
)
def test_a_flipped_byte_of_a_small_file_is_found(make, name, expected):
    cache = make()
    # A digit or a letter of a name, so that the file is still good JSON.
    data = (cache / name).read_bytes()
    digit = b"bad" if name == "skipped.jsonl" else b"00"
    (cache / name).write_bytes(data.replace(digit, digit[:-1] + b"1", 1))
    assert any(re.search(expected, problem) for problem in problems(cache))


def test_a_file_that_is_cut_is_found_by_its_size(make):
    cache = make()
    path = cache / "shards/000000.tar"
    path.write_bytes(path.read_bytes()[:-512])
    (problem,) = problems(cache)
    assert re.search(r"000000.tar has [\d,]+ bytes, expected [\d,]+", problem)


def test_a_flipped_byte_of_the_codebook_is_found_and_nothing_is_tokenised_with_it(make):
    cache = make()
    factories.flip_byte(cache / "codebook.safetensors")
    report = verify(cache, retokenize=5, device="cpu")
    assert "codebook.safetensors has SHA-256" in report.problems[0]
    assert report.retokenized == {}


def test_the_codebook_of_another_tokenizer_is_refused_by_both_fingerprints(make):
    cache = make()
    ours = factories.colour_codebook().fingerprint
    other = factories.colour_codebook(colours=factories.COLOURS[:5])
    other.save(cache / "codebook.safetensors")
    found = problems(cache)
    assert any(other.fingerprint in problem and ours in problem for problem in found)


def test_a_swapped_manifest_is_found(make, tmp_path):
    cache = make()
    cache.rename(tmp_path / "first")
    shutil.rmtree(tmp_path / "images")
    other = make(seed=1)
    shutil.copy(tmp_path / "first/manifest.json", other)
    (problem,) = problems(other)
    assert re.search(r"manifest.json is not that of its files: .*sha256 is", problem)


def test_a_swapped_shard_is_found(make):
    cache = make()
    first, second = (cache / f"shards/00000{i}.tar" for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert [problem[:6] for problem in problems(cache)] == ["unit 0", "unit 1"]


def test_an_id_that_is_not_below_k_is_found_although_every_digest_is_right(make):
    cache = make()

    def too_large(sample):
        token_ids = sample.token_ids.copy()
        token_ids[1, 2, 3] = 6
        return sample._replace(token_ids=token_ids)

    rewrite_unit(cache, 0, too_large)
    assert problems(cache) == [
        "unit 0: a/000: token id 6 is not below K=6",
        "unit 0: a/002: token id 6 is not below K=6",
    ]


def test_a_wrong_id_is_found_by_tokenising_again(make):
    cache = make()

    def other(sample):
        token_ids = sample.token_ids.copy()
        token_ids[1, 2, 3] = (token_ids[1, 2, 3] + 1) % 6
        return sample._replace(token_ids=token_ids)

    rewrite_unit(cache, 0, other)
    assert problems(cache) == []
    report = verify(cache, retokenize=100, device="cpu")
    ((fingerprint, again),) = report.retokenized.items()
    assert again == Retokenized(5, 160, 0, 2)
    assert report.problems == [
        f"tokenizer {fingerprint[:12]}: 2 of 160 token ids differ from those of the same views "
        "tokenised again"
    ]


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ([[0, 0, 16, 16, 0]], r"views of shape \(1, 5\)"),
        ([[0, 0, 0, 16, 0]] * 2, "are not boxes"),
        ([[0, -1, 16, 16, 0]] * 2, "are not boxes"),
        ([[0, 0, 16, 16, 2]] * 2, "are not boxes"),
        ([[0, 0, 48, 65, 0]] * 2, "leave the picture of 48 x 64 pixels"),
        ([[1, 0, 48, 64, 0]] * 2, "leave the picture of 48 x 64 pixels"),
        ([[0, 0, 48, 48, 0]] * 2, r"are not those of its key, \[\[0, 8, 48, 48, 0\], "),
    ],
)
def test_views_that_are_not_those_of_the_image_are_found(make, views, expected):
    cache = make()
    views = np.array(views, np.int32)
    rewrite_unit(cache, 1, lambda sample: sample._replace(views=views))
    found = problems(cache)
    assert len(found) == 2
    assert all(re.search(expected, problem) for problem in found)


def test_a_picture_of_another_size_than_it_says_cannot_be_tokenised_again(make):
    cache = make()
    small = factories.encode(factories.draw_photo(0, 24, 32), "JPEG")
    rewrite_unit(cache, 0, lambda sample: sample._replace(image=small))
    with pytest.raises(ArtifactError, match=r"a/00. cannot be tokenised again: view"):
        verify(cache, retokenize=100, device="cpu")


def test_a_lost_sample_and_a_doubled_one_are_found(make):
    cache = make()
    with TokenCache.open(cache) as opened:
        first = opened[0]
    rewrite_unit(cache, 1, lambda sample: first)
    found = problems(cache)
    assert "unit 1: keys do not match the plan, first ['a/000', 'a/004', 'b/001']" in found
    assert "unit 1: keys seen before, first a/000" in found


def test_a_key_seen_before_where_the_commit_record_is_lost_stops_no_check(make):
    check = CacheCheck(make())
    check.check_units(range(3), ClusterOptions(num_workers=0))
    of_a_layer = {"keys": check.findings[0].keys, "parts": {"": PartFinding(None, 1)}}
    check.findings[1] = check.findings[1]._replace(**of_a_layer)
    assert not any("seen before" in damage.detail for damage in check.conclude().damages)


def test_a_sample_without_its_image_is_found(make):
    cache = make()
    rewrite_unit(cache, 0, lambda sample: sample._replace(image=None))
    assert problems(cache) == [
        "unit 0: a/000: the image is missing",
        "unit 0: a/002: the image is missing",
    ]


def test_a_zarr_store_whose_description_is_gone_is_found(make):
    cache = make("zarr")
    (cache / "tokens.zarr/tokens/zarr.json").unlink()
    assert problems(cache) == [f"{cache}/tokens.zarr/tokens/zarr.json is missing"]


def test_an_unfinished_cache_is_refused(make):
    cache = make()
    (cache / "manifest.json").unlink()
    (cache / "units/000001.json").unlink()
    with pytest.raises(ArtifactError, match="build has not finished"):
        verify(cache)


def test_images_that_lie_elsewhere_now_are_named_by_the_user(make, tmp_path):
    cache = make(images_in_cache="none")
    (tmp_path / "images").rename(tmp_path / "moved")
    assert problems(cache) == []
    with pytest.raises(SourceError, match="Name the folder that they lie in now"):
        verify(cache, retokenize=3, device="cpu")
    report = verify(cache, retokenize=3, device="cpu", images=str(tmp_path / "moved"))
    assert report.problems == []
    (again,) = report.retokenized.values()
    assert again.num_images == 3


def test_images_that_are_not_those_of_the_tokens_are_found(make, tmp_path):
    cache = make(images_in_cache="none")
    # Of the same size, but another picture.
    other = factories.encode(factories.draw_photo(99), "JPEG")
    for path in (tmp_path / "images").rglob("00*.jpg"):
        path.write_bytes(other)
    report = verify(cache, retokenize=100, device="cpu")
    (again,) = report.retokenized.values()
    assert again.num_different > 50
    assert "token ids differ" in report.problems[0]
