"""What `inspect` counts of a cache is what a slow count of its samples says."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_builder import cache_survey
from cache_builder.cache_survey import spread
from cache_builder.cache_table import class_lines, histogram, survey_result
from cache_builder.errors import ArtifactError
from cache_builder.formats import TokenCache
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from cache_builder.formats.manifest import CacheManifest, LayerInfo
from cache_builder.quality import Agreement, mean_agreement
from tests import factories

GOLDEN = Path(__file__).parent.parent / "golden/v1/webdataset"
BAD = {"a/bad.png": b"", "b/worse.png": b"", "b/zz.jpg": b"no image"}


@pytest.fixture(params=["webdataset", "zarr"])
def layout(request):
    return request.param


def build(tmp_path, codebook, images=None, **settings):
    images = images or factories.photo_images(7, height=40, width=56) | BAD
    folder = factories.write_folder(tmp_path / "images", images)
    settings = {"num_views": 3, "unit_size": 4} | settings
    factories.build_cache(images=str(folder), codebook=codebook, out=tmp_path / "cache", **settings)
    return tmp_path / "cache"


def survey(path, **options):
    with TokenCache.open(path) as cache:
        return cache_survey.run(cache, **options)


def samples_of(path):
    with TokenCache.open(path) as cache:
        return list(cache)


def test_columns_hold_what_the_samples_hold(tmp_path, codebook_path, layout):
    images = factories.photo_images(7, height=40, width=56) | BAD
    path = build(tmp_path, codebook_path, images, layout=layout, unit_size=2)
    with TokenCache.open(path) as cache:
        assert {shard.num_samples for shard in cache.manifest.shards} == {0, 1, 2}
        for shard, info in enumerate(cache.manifest.shards):
            columns = cache.columns(shard)
            samples = list(cache.read_shard(shard))
            assert len(samples) == info.num_samples
            assert columns.keys == [sample.key for sample in samples]
            assert columns.labels.tolist() == [sample.label for sample in samples]
            assert columns.views.tolist() == [sample.views.tolist() for sample in samples]
            assert columns.token_ids.tolist() == [s.token_ids.tolist() for s in samples]
            assert columns.token_ids.shape[1:] == (3, 4, 4)
            assert columns.token_ids.dtype == np.uint16
            assert columns.image_sizes.tolist() == [[40, 56]] * len(samples)


def build_two(tmp_path, base, further, **settings):
    """Build a cache with a layer of another tokenizer, in this process."""
    images = factories.write_folder(tmp_path / "images", factories.photo_images(5))
    factories.build_cache(
        images=str(images), codebook=base, further_codebooks=(further,), num_views=2,
        out=tmp_path / "cache", unit_size=3, **settings,
    )  # fmt: skip
    return tmp_path / "cache", Codebook.load(further).fingerprint


def test_a_further_tokenizer_of_a_cache_is_counted_by_itself(tmp_path, codebook_path, layout):
    further = factories.write_codebook(tmp_path / "two.safetensors", colours=factories.COLOURS[:3])
    path, fingerprint = build_two(tmp_path, codebook_path, further, layout=layout)
    with TokenCache.open(path, fingerprint) as cache:
        found = cache_survey.run(cache)
        ids = np.concatenate([sample.token_ids.ravel() for sample in cache])
        images = [sample.image for sample in cache]
    assert found.counts.tolist() == [np.bincount(ids, minlength=3).tolist()]
    assert found.part_bytes["image"] == sum(map(len, images))
    assert survey(path).counts.shape == (1, 6)


def test_each_tokenizer_of_a_cache_is_listed_and_shown_on_request(
    patchcache, tmp_path, codebook_path, layout
):
    further = factories.write_codebook(tmp_path / "two.safetensors", colours=factories.COLOURS[:3])
    path, second = build_two(tmp_path, codebook_path, further, layout=layout)
    first, page = Codebook.load(codebook_path).fingerprint, tmp_path / "page.html"
    for shown, other, vocab_size, words in (
        (first, second, 6, ()),
        (second, first, 3, ("--tokenizer", second[:6])),
    ):
        result = json.loads(patchcache("inspect", path, *words, "--json").out)
        assert (result["fingerprint"], result["vocab_size"]) == (shown, vocab_size)
        assert result["tokenizers"] == [
            {"fingerprint": first, "num_views": 2}, {"fingerprint": second, "num_views": 2}
        ]  # fmt: skip
        text = patchcache("inspect", path, *words, "--page", page).out
        for document in (text, page.read_text()):
            assert f"{shown}, 2 views: the one counted here" in document
            assert f"{other}, 2 views: --tokenizer {other[:8]} counts it" in document
        assert f"K = {vocab_size}, " in page.read_text()
    refused = patchcache("inspect", path, "--tokenizer", "f00")
    assert refused.status == 1
    assert f"holds targets of tokenizers {min(first, second)}, " in refused.err


def test_a_cache_of_one_tokenizer_does_not_list_it_twice(patchcache, tmp_path, codebook_path):
    out = patchcache("inspect", build(tmp_path, codebook_path)).out
    assert out.count(Codebook.load(codebook_path).fingerprint) == 1
    assert "tokenizer " not in out


def test_views_of_a_tokenizer_are_those_of_all_its_layers():
    spec = CacheManifest.load(GOLDEN).spec
    manifest = CacheManifest.load(GOLDEN)
    layer = {"name": "", "manifest": manifest.codebook}
    layers = (
        LayerInfo(fingerprint="b", first_view=0, num_views=3, **layer),
        LayerInfo(fingerprint=spec.fingerprint, first_view=3, num_views=2, **layer),
        LayerInfo(fingerprint="a", first_view=0, num_views=3, **layer),
        LayerInfo(fingerprint="b", first_view=3, num_views=4, **layer),
    )
    found = manifest.model_copy(update={"layers": layers}).tokenizers
    own = spec.view_spec.num_views + 2
    assert list(found.items()) == [(spec.fingerprint, own), ("a", 3), ("b", 7)]


def test_a_cache_on_an_object_store_is_counted_as_a_local_one(
    patchcache, bucket, tmp_path, codebook_path, layout
):
    images = factories.write_folder(tmp_path / "images", factories.photo_images(5) | BAD)
    places = tmp_path / "cache", f"{bucket}/runs/cache"
    for place in places:
        factories.build_cache(
            images=str(images), codebook=codebook_path, out=place, layout=layout, unit_size=3
        )
    local, remote = (json.loads(patchcache("inspect", p, "--json").out) for p in places)
    assert local == remote
    page = tmp_path / "page.html"
    assert patchcache("inspect", places[1], "--page", page).status == 0
    assert "view 0 of a/000" in page.read_text()


def test_columns_are_read_in_pieces_where_images_lie_between(tmp_path, codebook_path, monkeypatch):
    big = {f"{i}.png": factories.encode(factories.draw_photo(i, 64, 64)) for i in range(3)}
    path = build(tmp_path, codebook_path, big)
    with TokenCache.open(path) as cache:
        keys = [s.key for s in cache]
        assert cache.columns(0).keys == keys
        stretches = list(cache.shard(0)._stretches(("tokens.npy",)))
        assert [len(entries) for _, _, entries in stretches] == [1, 1, 1]
        bytes_read = sum(stop - start for start, stop, _ in stretches)
        assert bytes_read < cache.manifest.bytes / 3


def test_ids_are_counted_for_every_stage(tmp_path, layout):
    rng = np.random.default_rng(0)
    codebook = Codebook(
        rng.integers(-60, 60, (3, 9, 48)).astype(np.int16)
        + np.array([128, 0, 0])[:, None, None].astype(np.int16),
        np.ones((3, 9), np.int64),
        metric="l2",
        pixel_rule=PixelRule(size=factories.SIZE, patch_size=factories.PATCH),
        extractor=ExtractorSpec(id="pixel"),
    )
    codebook.save(tmp_path / "c.safetensors")
    path = build(tmp_path, tmp_path / "c.safetensors", layout=layout)
    found = survey(path)
    counts = np.zeros((3, 9), int)
    for sample in samples_of(path):
        for ids in sample.token_ids.reshape(-1, 3):
            for stage, token_id in enumerate(ids):
                counts[stage, token_id] += 1
    assert np.array_equal(found.counts, counts)
    result = survey_result(found)
    for stage, expected in zip(result["stages"], counts, strict=True):
        shares = expected[expected > 0] / expected.sum()
        entropy_bits = -(shares * np.log2(shares)).sum()
        assert stage["num_tokens"] == 7 * 3 * 16
        assert stage["entropy_bits"] == pytest.approx(entropy_bits, abs=1e-4)
        assert stage["perplexity"] == pytest.approx(2**entropy_bits, abs=0.01)
        assert stage["num_dead"] == (expected == 0).sum()
        assert stage["max_share"] == pytest.approx(shares.max(), abs=1e-6)


def test_neighbours_are_those_of_every_view(tmp_path, codebook_path, layout):
    path = build(tmp_path, codebook_path, layout=layout)
    alike = {"horizontal": [], "vertical": [], "shuffled": []}
    for sample in samples_of(path):
        for ids in sample.token_ids:
            alike["horizontal"] += (ids[:, 1:] == ids[:, :-1]).ravel().tolist()
            alike["vertical"] += (ids[1:] == ids[:-1]).ravel().tolist()
            flat = ids.ravel()
            alike["shuffled"] += [
                flat[i] == flat[j] for i in range(16) for j in range(16) if i != j
            ]
    for name, value in survey(path).neighbours._asdict().items():
        assert value == pytest.approx(np.mean(alike[name])), name


def test_agreement_is_weighed_by_images():
    parts = [(1, Agreement(0, 0.5, 1)), (3, Agreement(1, 0.5, 0))]
    assert mean_agreement(parts) == Agreement(0.75, 0.5, 0.25)
    with pytest.raises(ValueError, match="no images"):
        mean_agreement([])


def test_views_are_measured_against_their_images(tmp_path, codebook_path, layout):
    path = build(tmp_path, codebook_path, layout=layout, scale=(0.1, 0.6))
    first, others, together, mirrored = [], [], [], []
    for sample in samples_of(path):
        shown = np.zeros((40, 56), bool)
        for number, (top, left, height, width, hflip) in enumerate(sample.views.tolist()):
            shown[top : top + height, left : left + width] = True
            share = height * width / (40 * 56)
            if number:
                others.append(share)
                mirrored.append(hflip)
            else:
                first.append(share)
        together.append(shown.mean())
    views = survey(path).views
    assert views.first == pytest.approx(np.mean(first))
    ends = [min(others), np.median(others), max(others)]
    assert list(views.others) == pytest.approx(ends, abs=6e-4)
    assert views.together == pytest.approx(np.mean(together), abs=0.03)
    assert views.mirrored == pytest.approx(np.mean(mirrored))


def test_with_one_view_there_is_nothing_to_say_of_others(tmp_path, codebook_path):
    views = survey(build(tmp_path, codebook_path, num_views=1)).views
    assert (views.others, views.mirrored) == (None, None)
    assert views.together == pytest.approx(views.first, abs=0.05)


def test_sizes_of_images_and_parts_add_up(tmp_path, codebook_path, layout):
    images = {
        f"{i}.png": factories.encode(factories.draw_photo(i, *size))
        for i, size in enumerate([(20, 30), (40, 30), (60, 90), (24, 31), (22, 33)])
    }
    path = build(tmp_path, codebook_path, images, layout=layout)
    found = survey(path)
    sizes = [Image.open(io.BytesIO(data)).size for data in images.values()]
    for values, axis in ((found.widths, 0), (found.heights, 1)):
        column = [size[axis] for size in sizes]
        assert values == (min(column), np.median(column), max(column))
    assert found.part_bytes["image"] == sum(len(data) for data in images.values())
    shards = [shard.bytes for shard in found.manifest.shards]
    assert found.shard_bytes == (min(shards), np.median(shards), max(shards))
    if layout == "zarr":
        assert sum(found.part_bytes.values()) == found.manifest.bytes
    else:
        assert found.part_bytes["tokens"] == 5 * (128 + 3 * 16 * 2)


def test_payloads_have_sizes_of_their_own(tmp_path, layout):
    codebook = factories.feature_codebook()
    codebook.save(tmp_path / "c.safetensors")
    path = build(
        tmp_path, tmp_path / "c.safetensors", layout=layout, soft_top_k=2, store_features="int8"
    )
    found = survey(path)
    assert found.part_bytes["soft"] == found.manifest.soft.bytes
    assert found.part_bytes["features"] == found.manifest.features.bytes


def test_labels_reasons_and_classes_without_images_are_counted(tmp_path, codebook_path, layout):
    images = factories.photo_images(5) | BAD | {"c/only.png": b"12 bytes here"}
    found = survey(build(tmp_path, codebook_path, images, layout=layout))
    assert found.labels == {0: 3, 1: 2}
    result = survey_result(found)
    assert result["labels"] == {"a": 3, "b": 2}
    assert (result["num_classes"], result["num_empty_classes"]) == (3, 1)
    assert class_lines(found, 10, 5) == [("a", 3), ("b", 2), ("c", 0)]
    assert class_lines(found, 1, 0) == [("a", 3), ("(2 classes between)", -1)]
    reasons = Counter(sample.reason for sample in found.skipped)
    assert dict(found.skip_reasons) == reasons
    assert found.skip_reasons[0][1] == 2
    assert sum(result["skip_reasons"].values()) == result["num_skipped"] == 4


def test_reasons_that_differ_in_numbers_alone_are_one(tmp_path, codebook_path):
    path = build(tmp_path, codebook_path)
    lines = [
        {"key": str(i), "source": str(i), "reason": f"{i} x 1,000,000 pixels are more than 1"}
        for i in range(3)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "skipped.jsonl").write_text(text)
    assert survey(path).skip_reasons == [("# x # pixels are more than #", 3)]
    (path / "skipped.jsonl").write_text("{}\n")
    with pytest.raises(ArtifactError, match=r"skipped.jsonl cannot be read"):
        survey(path)


def test_a_bound_reads_whole_shards_and_says_so(tmp_path, codebook_path, layout):
    path = build(tmp_path, codebook_path, factories.patch_images(20), layout=layout)
    found = survey(path, max_images=6)
    assert (found.num_images, found.num_shards) == (8, 2)
    assert found.num_tokens == 8 * 3 * 16
    assert survey(path, max_images=6).counts.tolist() == found.counts.tolist()
    assert survey(path, max_images=99).num_images == 20


def test_progress_ends_at_the_number_of_images(tmp_path, codebook_path):
    calls = []
    survey(build(tmp_path, codebook_path), progress=lambda *args: calls.append(args))
    assert calls[-1] == (7, 7)
    assert calls == sorted(set(calls))


def test_examples_come_from_every_class_before_a_second_from_any(tmp_path, codebook_path, layout):
    images = {f"{'abc'[i % 7 % 3]}/{i}.png": d for i, d in enumerate(
        factories.patch_images(21).values())}  # fmt: skip
    path = build(tmp_path, codebook_path, images, layout=layout)
    found = survey(path, num_examples=5)
    assert sorted(Counter(example.label for example in found.examples).values()) == [1, 2, 2]
    assert survey(path, num_examples=5).examples == found.examples
    with TokenCache.open(path) as cache:
        for example in found.examples:
            sample = cache.read(example.shard, example.row)
            assert (sample.key, sample.label) == (example.key, example.label)
    assert survey(path).examples == []


def test_a_damaged_array_is_refused_by_name(tmp_path, codebook_path):
    path = build(tmp_path, codebook_path)
    tar = path / "shards/000000.tar"
    data = tar.read_bytes()
    with TokenCache.open(path) as cache:
        offset, _ = cache.shard(0)._entries[1].members["tokens.npy"]
    tar.write_bytes(data[: offset + 3] + b"\0" + data[offset + 4 :])
    with pytest.raises(ArtifactError, match=r"000000.tar: tokens.npy is damaged"):
        survey(path)
    tar.write_bytes(data[: offset + 128] + b"\xff\xff" + data[offset + 130 :])
    with pytest.raises(ArtifactError, match="token id 65535 of shard 0 is not below K=6"):
        survey(path)
    tar.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="ends before sample"):
        survey(path)


def test_the_middle_of_counted_values_is_their_median():
    for values in ([5], [1, 2], [3, 3, 9], [1, 1, 2, 8], list(range(10))):
        assert spread(Counter(values)) == (min(values), np.median(values), max(values))


def test_the_histogram_has_log_spaced_ranks_and_ends_at_the_last_id():
    counts = np.array([0, 5, 1, 30, 2, 2])
    lines = histogram(counts)
    assert [(line.rank, line.tokens) for line in lines] == [(1, 30), (2, 5), (4, 2), (6, 0)]
    assert [line.cumulative_share for line in lines] == [0.75, 0.875, 0.975, 1]
    assert [line.rank for line in histogram(np.zeros(1, int))] == [1]


def test_the_command_prints_tables_or_json(patchcache, tmp_path, codebook_path):
    path = build(tmp_path, codebook_path)
    done = patchcache("inspect", path)
    assert done.status == 0, done.err
    for words in ("perplexity", "rank of id", "skipped because", "neighbours alike", "no log"):
        assert words in done.out, words
    result = json.loads(patchcache("inspect", path, "--json").out)
    assert result == json.loads(json.dumps(survey_result(survey(path))))
    bounded = json.loads(patchcache("inspect", path, "--json", "--max-images", 1).out)
    assert bounded["num_samples_surveyed"] < bounded["num_samples"] == 7


def test_where_images_lie_means_nothing_without_a_page(patchcache, tmp_path, codebook_path):
    done = patchcache("inspect", build(tmp_path, codebook_path), "--images", tmp_path)
    assert (done.status, len(done.err.splitlines())) == (1, 1)
    assert "for the pictures of --page" in done.err
