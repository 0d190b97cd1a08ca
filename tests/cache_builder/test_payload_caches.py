"""A cache with soft targets and features gives them back, and only to those who ask."""

import io
import json
import re
import subprocess
import tarfile

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file

from cache_builder.errors import ArtifactError, ConfigError
from cache_builder.formats import TokenCache
from cache_builder.formats.manifest import UnitRecord
from cache_builder.formats.shards import read_shard
from cache_builder.inspection import describe
from cache_builder.targets import TargetMaker
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.tokenizers.models import create_model
from tests import factories
from tests.cache_builder.payload_caches import ARRAYS, assert_same, samples_of, settings

LAYOUTS = ["webdataset", "zarr"]


@pytest.fixture(scope="module")
def codebook():
    return factories.feature_codebook()


@pytest.fixture
def make(tmp_path, codebook):
    """Build a cache of five photographs, soft targets and int8 features, in three units."""
    factories.write_folder(tmp_path / "images", factories.photo_images(5))
    codebook.save(tmp_path / "codebook.safetensors")

    def build_it(layout="webdataset", out="cache", **changes):
        factories.build_cache(**settings(tmp_path, out=tmp_path / out, layout=layout, **changes))
        return tmp_path / out

    return build_it


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("store_features", ["int8", "float16"])
def test_every_sample_carries_the_targets_that_the_library_makes(
    make, codebook, layout, store_features
):
    cache_dir = make(layout, store_features=store_features)
    tokenizer = PatchTokenizer.load(codebook)
    with TokenCache.open(cache_dir) as cache:
        assert cache.manifest.payloads == ("tokens", "views", "image", "soft", "features")
        maker = TargetMaker(tokenizer, cache.manifest.spec)
        for sample in cache:
            targets = maker.make(factories.views_of(sample, tokenizer.pixel_rule))
            for name in ARRAYS:
                if store_features == "float16" and name == "feature_scales":
                    assert sample.feature_scales is None
                    continue
                expected, found = getattr(targets, name), getattr(sample, name)
                assert found.dtype == expected.dtype, name
                # Views of one image in a batch of their own: features may round otherwise.
                if name in ("token_ids", "soft_ids"):
                    assert (found != expected).mean() < 0.01, name
                else:
                    allowed = 1 if found.dtype == np.int8 else 2e-3 * np.abs(expected).max()
                    assert np.abs(found.astype(float) - expected).max() <= allowed, name
            stored = sample.float_features()
            assert (stored.dtype, stored.shape) == (np.float32, (2, 8, 8, codebook.dim))


def test_both_layouts_hold_the_same(make):
    assert_same(samples_of(make("zarr", "z")), samples_of(make("webdataset", "w")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rest_of_a_cache_is_what_it_is_without_payloads(make, layout):
    bare = make(layout, "bare", soft_top_k=None, soft_temperature=None, store_features=None)
    found = samples_of(make(layout), payloads=["image"])
    expected = samples_of(bare)
    assert_same(found, expected, ["token_ids", "views"])
    for name in ARRAYS[1:]:
        assert [getattr(sample, name) for sample in found + expected] == [None] * 10
    for name in ("plan.json", "manifest.json", "units/000000.json"):
        assert not {"soft", "features"} & json.loads((bare / name).read_text()).keys()
    assert not {"soft", "features"} & json.loads((bare / "plan.json").read_text())["spec"].keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reader_gets_the_payloads_that_it_asks_for(make, layout):
    cache_dir = make(layout)
    whole = samples_of(cache_dir)
    for payloads, names in (
        ((), set()),
        (("soft",), {"soft_ids", "soft_probs"}),
        (("features", "image"), {"image", "features", "feature_scales"}),
    ):
        for sample, expected in zip(samples_of(cache_dir, payloads=payloads), whole, strict=True):
            optional = {"image", *ARRAYS[1:]}
            assert {name for name in optional if getattr(sample, name) is not None} == names
            assert (sample.key, sample.label) == (expected.key, expected.label)
            np.testing.assert_array_equal(sample.token_ids, expected.token_ids)
            for name in names:
                np.testing.assert_array_equal(getattr(sample, name), getattr(expected, name))
    with (
        TokenCache.open(cache_dir) as cache,
        pytest.raises(
            ValueError, match=r"\['tokens'\] are not all of \['features', 'image', 'soft'\]"
        ),
    ):
        cache.read(0, 0, payloads=["tokens"])


def test_features_that_nobody_asks_for_are_not_read_from_a_tar(make):
    cache_dir = make()
    shard = cache_dir / "shards/000000.tar"
    expected = samples_of(cache_dir)[1]
    record = factories.read(UnitRecord, cache_dir, "units/000000.json")
    members = record.samples[1].members
    in_order = sorted(members, key=lambda extension: members[extension][0])
    assert in_order[-2:] == ["features.npy", "feature_scales.npy"]
    shard.write_bytes(shard.read_bytes()[: members["features.npy"][0]])
    with TokenCache.open(cache_dir) as cache:
        sample = cache.read(0, 1, payloads=["image", "soft"])
        np.testing.assert_array_equal(sample.soft_probs, expected.soft_probs)
        assert sample.image == expected.image
        with pytest.raises(ArtifactError, match="ends before sample a/002"):
            cache.read(0, 1)


def test_features_that_nobody_asks_for_are_not_read_from_a_zarr_store(make):
    cache_dir = make("zarr")
    expected = samples_of(cache_dir)[1]
    chunk = cache_dir / "tokens.zarr/features/c/0/0/0/0/0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with TokenCache.open(cache_dir) as cache:
        sample = cache.read(0, 1, payloads=["image", "soft"])
        np.testing.assert_array_equal(sample.soft_probs, expected.soft_probs)
        with pytest.raises(ArtifactError, match=r"unit 0 cannot be read .*patchcache verify"):
            cache.read(0, 1)


def test_samples_are_found_in_any_order_when_a_unit_has_many_chunks(make, monkeypatch):
    from cache_builder.formats import zarr_store

    # A row of features takes 2 x 8 x 8 x D bytes, so that a chunk of these holds two rows.
    monkeypatch.setattr(zarr_store, "_MAX_PAYLOAD_CHUNK_BYTES", 2 * 2 * 64 * 128 + 1)
    cache_dir = make("zarr", unit_size=4)
    group = zarr.open_group(cache_dir / "tokens.zarr", mode="r")
    assert (group["features"].chunks[0], group["features"].shards[0]) == (2, 4)
    assert group["tokens"].chunks[0] == 4
    expected = samples_of(make("webdataset", "tars", unit_size=4))
    with TokenCache.open(cache_dir) as cache:
        order = [3, 0, 4, 2, 1, 1, 3]
        assert_same([cache[i] for i in order], [expected[i] for i in order])


def test_plain_tools_read_the_payloads(make):
    tars, store = make("webdataset", "w"), make("zarr", "z")
    listed = subprocess.run(
        ["tar", "tf", tars / "shards/000000.tar"], capture_output=True, text=True, check=True
    )
    names = ["jpg", "json", "tokens.npy", "views.npy", *(f"{name}.npy" for name in ARRAYS[1:])]
    assert listed.stdout.split()[:8] == [f"a/000.{name}" for name in names]
    group = zarr.open_group(store / "tokens.zarr", mode="r")
    for name in ARRAYS[1:]:
        with tarfile.open(tars / "shards/000000.tar") as tar:
            array = np.load(io.BytesIO(tar.extractfile(f"a/000.{name}.npy").read()))
        np.testing.assert_array_equal(group[name][0], array)
        assert group[name].shards[0] == 2
    assert (group["soft_ids"][5] == 65_535).all()  # a row without a sample
    assert (group["features"][5] == 0).all()


def test_a_tar_is_walked_without_its_record(make):
    cache_dir = make()
    found = list(read_shard(cache_dir / "shards/000000.tar"))
    assert_same(found, samples_of(cache_dir)[:2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_measured_values_are_in_records_manifest_and_inspect(make, codebook, layout):
    cache_dir = make(layout)
    with TokenCache.open(cache_dir) as cache:
        manifest, samples = cache.manifest, list(cache)
    probabilities = np.concatenate([s.soft_probs.reshape(-1, 4) for s in samples]).astype(float)
    entropy = -(probabilities * np.log(probabilities.clip(1e-30))).sum(1)
    assert manifest.soft.num_patches == len(entropy) == 5 * 2 * 64
    assert manifest.soft.perplexity == pytest.approx(np.exp(entropy).mean(), abs=2e-3)
    assert 0.3 < manifest.soft.mass < 1
    assert 0 < manifest.features.relative_error < 0.02
    assert manifest.features.cosine > 0.999
    records = [
        factories.read(UnitRecord, cache_dir, f"units/00000{unit}.json") for unit in range(3)
    ]
    sizes = [{"soft": 0, "features": 0} for _ in records]
    for record, size in zip(records, sizes, strict=True):
        for file in record.files if layout == "zarr" else ():
            for payload, names in (("soft", ARRAYS[1:3]), ("features", ARRAYS[3:])):
                size[payload] += file.bytes * (file.path.split("/")[1] in names)
        for entry in record.samples:
            size["soft"] += sum(entry.members[f"{name}.npy"][1] for name in ARRAYS[1:3])
            size["features"] += sum(entry.members[f"{name}.npy"][1] for name in ARRAYS[3:])
    assert [(r.soft.bytes, r.features.bytes) for r in records] == [
        (size["soft"], size["features"]) for size in sizes
    ]
    assert manifest.features.bytes == sum(size["features"] for size in sizes) > 1000
    description = describe(cache_dir)
    assert description["soft"]["top_k"] == 4
    assert description["soft"]["bytes_per_sample"] == round(manifest.soft.bytes / 5, 1)
    assert description["features"]["relative_error"] == manifest.features.relative_error
    assert description["features"]["dim"] == codebook.dim
    assert json.loads(json.dumps(description)) == description


def test_inspect_shows_the_payloads_of_a_shard(make):
    first = describe(make() / "shards/000000.tar")["first"]
    assert first["soft_ids_shape"] == [2, 8, 8, 4]
    assert first["features_shape"] == [2, 8, 8, 128]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_the_units_does_not_change_a_byte(make, tmp_path, layout):
    expected = factories.contents(make(layout))
    other = settings(tmp_path, layout=layout, out=tmp_path / "other")
    plan = factories.plan_cache(**other)
    for unit in reversed(range(plan.num_units)):
        factories.make_worker(other["out"], plan).run(unit)
    factories.finish(other["out"])
    assert factories.contents(other["out"]) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_payload_is_built_again(make, tmp_path, layout):
    cache_dir = make(layout)
    before = factories.contents(cache_dir)
    record = factories.read(UnitRecord, cache_dir, "units/000001.json")
    factories.flip_byte(cache_dir / record.files[-2 if layout == "zarr" else 0].path)
    make(layout)
    assert factories.contents(cache_dir) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_unit_of_bad_images_alone_measures_nothing(make, tmp_path, layout):
    for name in ("a/000.jpg", "a/002.jpg"):
        (tmp_path / "images" / name).write_bytes(b"text")
    cache_dir = make(layout)
    record = factories.read(UnitRecord, cache_dir, "units/000000.json")
    assert (record.soft, record.features) == (None, None)
    with TokenCache.open(cache_dir) as cache:
        assert cache.manifest.soft.num_patches == 3 * 2 * 64
        assert [sample.key for sample in cache] == ["a/004", "b/001", "b/003"]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"soft_top_k": 3}, r"soft.top_k: 4 there, 3 now"),
        ({"soft_temperature": 0.25}, r"soft.temperature: 0.5 there, 0.25 now"),
        ({"soft_top_k": None, "soft_temperature": None}, r"soft.top_k: 4 there, null now"),
        ({"store_features": "float16"}, r'features.dtype: "int8" there, "float16" now'),
        ({"store_features": None}, r'features.dtype: "int8" there, null now'),
    ],
)
def test_other_payloads_are_refused_and_the_difference_is_named(
    make, tmp_path, changes, difference
):
    factories.plan_cache(**settings(tmp_path))
    with pytest.raises(ConfigError, match=rf"other settings: .*{difference}.*first command again"):
        factories.plan_cache(**settings(tmp_path, **changes))


def test_a_cache_planned_without_payloads_does_not_get_them(make, tmp_path):
    bare = {"soft_top_k": None, "soft_temperature": None, "store_features": None}
    factories.plan_cache(**settings(tmp_path, **bare))
    with pytest.raises(
        ConfigError, match=r'features.dtype: null there, "int8" now.*soft.top_k: null there, 4 now'
    ):
        factories.plan_cache(**settings(tmp_path))


@pytest.mark.parametrize(
    ("value", "store_features", "message"),
    [
        (float("nan"), None, r"a/000 to a/002: The features hold NaN or infinity\. Check the mod"),
        (
            float("nan"),
            "int8",
            r"a/000 to a/002: The features hold NaN or infinity\. Check the mod",
        ),
        (
            1e5,
            "float16",
            r"a/000 to a/002: A feature value is .*65,504\. Use --store-features int8",
        ),
    ],
)
def test_features_that_cannot_be_stored_end_the_build_in_one_line(
    make, tmp_path, value, store_features, message
):
    model = create_model("timm", "resnet10t", "random:0", {}, 64)
    state = model.state_dict()
    (name,) = [name for name in state if name.startswith("layer2") and name.endswith("bn2.bias")]
    state[name] = torch.full_like(state[name], value)
    save_file(state, tmp_path / "weights.safetensors")
    features = f"timm:resnet10t@{tmp_path / 'weights.safetensors'}"
    centroids = np.random.default_rng(0).normal(size=(1, 16, 128)).astype(np.float32)
    codebook = factories.feature_codebook(features, centroids=centroids, objective=(1.0,))
    codebook.save(tmp_path / "codebook.safetensors")
    soft = {} if store_features else {"soft_top_k": None, "soft_temperature": None}
    with pytest.raises(ConfigError, match=message):
        make(store_features=store_features, **soft)
    if store_features == "float16":
        assert samples_of(make(out="int8", store_features="int8"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_builds_the_same_and_says_what_the_payloads_came_to(make, tmp_path, patchcache):
    alone = make(out="alone")
    words = [
        "build", "--images", tmp_path / "images", "--codebook", tmp_path / "codebook.safetensors",
        "--out", tmp_path / "cache", "--views", 2, "--unit-size", 2, "--device", "cpu",
        "--soft-top-k", 4, "--soft-temperature", 0.5, "--store-features", "int8",
    ]  # fmt: skip
    done = patchcache(*words)
    assert done.status == 0, done.err
    assert factories.contents(tmp_path / "cache") == factories.contents(alone)
    assert re.search(r"soft +top 4, perplexity [\d.]+, [\d.]+% of all probability, 2.3", done.out)
    assert re.search(
        r"features +128 values as int8, relative error 0.0\d+, cosine 0.99\d+, 17", done.out
    )
    result = json.loads(patchcache(*words, "--json").out)
    assert result["soft"]["perplexity"] > 1
    assert result["features"]["dtype"] == "int8"
    verified = patchcache("verify", tmp_path / "cache", "--retokenize", 2, "--device", "cpu")
    assert verified.status == 0
    assert "1,024 soft ids: 0 different" in verified.out
    assert "256 features: 0 different" in verified.out
    shown = patchcache("inspect", tmp_path / "cache").out
    assert re.search(r"soft targets, mass +[\d.]+%", shown)
    assert re.search(r"features, relative error +0.0\d+ +cosine 0.99", shown)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--soft-temperature 0.1", 1, "--soft-temperature has no meaning without --soft-top-k"),
        ("--soft-top-k 7", 1, "--soft-top-k must be 2 to 6, the centroids of this codebook, not 7"),
        ("--soft-top-k 4", 1, "the codebook records none. Fit it again with `patchcache fit`"),
        ("--store-features int8", 1, "--store-features has no meaning for a pixel tokenizer"),
        ("--store-features float32", 2, "Invalid value for '--store-features'"),
        ("--soft-top-k 1", 2, "Invalid value for '--soft-top-k'"),
    ],
)
def test_payloads_that_make_no_sense_are_one_line(
    tmp_path, codebook_path, patchcache, words, status, message
):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(2))
    out = tmp_path / "cache"
    given = ["--images", images, "--codebook", codebook_path, "--out", out, *words.split()]
    done = patchcache("build", *given)
    assert (done.status, done.out) == (status, "")
    assert message in done.err
    assert status == 2 or done.err.count("\n") == 1
    assert not out.exists()


def test_trainer_reads_the_same_batches_from_a_cache_with_payloads(make):
    from trainer.data import CachedViews, Pick

    bare = make("webdataset", "bare", soft_top_k=None, soft_temperature=None, store_features=None)
    picks = [Pick(1, 2, 0), Pick(0, 0, 1), Pick(3, 1, 1)]
    expected = CachedViews(bare, image_size=64).read(picks)
    for layout in LAYOUTS:
        batch = CachedViews(make(layout, layout), image_size=64).read(picks)
        assert batch.keys == expected.keys
        for name in ("pixels", "token_ids", "labels"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))
