"""A cache holds the tokens of its pixels, whatever happened while it was built."""

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from cache_builder import build
from cache_builder.errors import ArtifactError, ConfigError, SourceError
from cache_builder.formats import TokenCache, View, draw_views
from cache_builder.formats.plan import BuildPlan
from cache_builder.imaging import apply_view, decode
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.verify import run as verify
from tests import factories
from tests.cache_builder.builds import settings
from tests.factories import draw_photo, encode

LAYOUTS = ["webdataset", "zarr"]


def tokens_of(tokenizer, image, views):
    """Tokenise views of an encoded image, one after another."""
    rule = tokenizer.pixel_rule
    ids = []
    for top, left, height, width, hflip in views.tolist():
        view = View(top, left, height, width, bool(hflip))
        pixels = apply_view(decode(image), view, rule.size, rule.interpolation)
        ids.append(tokenizer.encode(pixels[None])[0].numpy())
    return np.stack(ids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_colours_come_back_in_every_view_also_in_mirrored_ones(tmp_path, codebook_path, layout):
    factories.write_folder(tmp_path / "images", factories.patch_images(20))
    whole_picture = {"num_views": 4, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    factories.build_cache(**settings(tmp_path, layout=layout, **whole_picture))
    num_mirrored = 0
    with TokenCache.open(tmp_path / "cache") as cache:
        for sample in cache:
            expected = factories.random_ids(int(sample.key.split("/")[1]))
            for token_ids, view in zip(sample.token_ids, sample.views, strict=True):
                mirrored = bool(view[4])
                num_mirrored += mirrored
                np.testing.assert_array_equal(
                    token_ids, expected[:, ::-1] if mirrored else expected
                )
    assert 10 < num_mirrored < 50


def test_colours_come_back_from_a_crop_of_a_larger_picture(tmp_path, codebook_path):
    # 8 x 8 patches; the centred square of the wide picture is columns 2..5 of 4 rows, twice as big.
    ids = factories.random_ids(0, 4, 8)
    picture = factories.draw_patches(ids, patch_size=8)
    factories.write_folder(tmp_path / "images", {"a.png": encode(picture)})
    factories.build_cache(**settings(tmp_path, num_views=1))
    with TokenCache.open(tmp_path / "cache") as cache:
        assert cache[0].views.tolist() == [[0, 16, 32, 32, 0]]
        np.testing.assert_array_equal(cache[0].token_ids[0], ids[:, 2:6])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images_in_cache", ["original", "resized", "none"])
def test_tokens_are_those_of_the_library_for_the_images_that_the_trainer_sees(
    tmp_path, codebook_path, photos_dir, layout, images_in_cache
):
    factories.build_cache(
        **settings(tmp_path, layout=layout, images_in_cache=images_in_cache, resized_short_side=20)
    )
    tokenizer = PatchTokenizer.load(codebook_path)
    with TokenCache.open(tmp_path / "cache") as cache:
        assert len(cache) == 5
        for sample in cache:
            original = (photos_dir / f"{sample.key}.jpg").read_bytes()
            image = original if sample.image is None else sample.image
            size = tuple(decode(image).shape[-2:])
            assert size == ((20, 27) if images_in_cache == "resized" else (48, 64))
            drawn = draw_views(cache.manifest.view_spec, sample.key, size)
            assert sample.views.tolist() == [list(map(int, view)) for view in drawn]
            expected = tokens_of(tokenizer, image, sample.views)
            np.testing.assert_array_equal(sample.token_ids, expected)
            if images_in_cache == "original":
                assert sample.image == original
            assert sample.label == "ab".index(sample.key[0])


def test_a_unit_of_many_batches_is_in_order(tmp_path, codebook_path):
    factories.write_folder(tmp_path / "images", factories.patch_images(40))
    factories.build_cache(**settings(tmp_path, unit_size=40, num_views=1))
    with TokenCache.open(tmp_path / "cache") as cache:
        for sample in cache:
            expected = factories.random_ids(int(sample.key.split("/")[1]))
            np.testing.assert_array_equal(sample.token_ids[0], expected)


def odd_images():
    """Return images that are tokenised, and files that are not, by name."""
    photo = draw_photo(0)
    image = Image.fromarray(photo)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    jpeg = encode(photo, "JPEG")
    frames = {"save_all": True, "append_images": [image.rotate(90)]}
    good = {
        "a/animated.gif": encode(image, "GIF", **frames),
        "a/animated.webp.webp": encode(image, "WEBP", **frames),
        "a/bits.png": encode(image.convert("1")),
        "a/cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "a/grey.jpg": encode(image.convert("L"), "JPEG"),
        "a/grey16.png": encode(Image.fromarray(photo[..., 0].astype(np.uint16) * 257)),
        "a/one_pixel.png": encode(photo[:1, :1]),
        "a/palette.png": encode(image.quantize(8), transparency=2),
        "a/progressive.jpg": encode(photo, "JPEG", progressive=True),
        "a/rgba.png": encode(image.convert("RGBA")),
        "a/rotated.jpg": encode(photo, "JPEG", exif=exif),
        "a/thin.png": encode(photo[:1]),
        "a/tiff.tif": encode(photo, "TIFF"),
        "a/wrong_name.jpg": encode(photo, "PNG"),
    }
    bad = {
        "a/cut.jpg": jpeg[: len(jpeg) // 2],
        "a/cut.png.png": encode(photo)[:-100],
        "a/empty.jpg": b"",
        "a/float.tif": encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
        "a/text.jpg": b"<html>404</html>",
    }
    return good, bad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_images_are_tokenised_or_recorded_and_none_stops_the_build(
    tmp_path, codebook_path, layout
):
    good, bad = odd_images()
    factories.write_folder(tmp_path / "images", good | bad)
    manifest = factories.build_cache(**settings(tmp_path, layout=layout, unit_size=3))
    assert (manifest.num_samples, manifest.num_skipped) == (len(good), len(bad))
    lines = (tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()
    skipped = {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}
    assert skipped.keys() == bad.keys()
    assert skipped["a/empty.jpg"] == "the file is empty"
    assert skipped["a/text.jpg"].startswith("not an image of a known format")
    assert skipped["a/cut.jpg"].startswith("cannot be decoded: ")
    tokenizer = PatchTokenizer.load(codebook_path)
    with TokenCache.open(tmp_path / "cache") as cache:
        samples = {sample.key: sample for sample in cache}
    images = sorted(good.items())
    assert len(samples) == len(images)
    for (name, data), key in zip(images, sorted(samples), strict=True):
        assert samples[key].image == data, name
        expected = tokens_of(tokenizer, data, samples[key].views)
        np.testing.assert_array_equal(samples[key].token_ids, expected)
    # The centred square of the upright picture: 64 high, 48 wide.
    assert samples["a/rotated"].views[0].tolist() == [8, 0, 48, 48, 0]
    report = verify(tmp_path / "cache", retokenize=100, device="cpu")
    assert report.problems == []
    assert report.num_skipped == len(bad)


def test_an_image_is_embedded_under_the_extension_of_its_content(tmp_path, codebook_path):
    images = {"a.jpg": encode(draw_photo(0)), "b.png": encode(draw_photo(0), "JPEG")}
    factories.write_folder(tmp_path / "images", images)
    factories.build_cache(**settings(tmp_path))
    with tarfile.open(tmp_path / "cache/shards/000000.tar") as tar:
        assert {"a.png", "b.jpg"} < set(tar.getnames())


def test_a_source_of_bad_images_alone_says_why(tmp_path, codebook_path):
    factories.write_folder(tmp_path / "images", {"a.jpg": b"", "b.jpg": b"text"})
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"Not one of 2 images .*first: the file is empty"):
            factories.build_cache(**settings(tmp_path))
        assert len((tmp_path / "cache/skipped.jsonl").read_text().splitlines()) == 2
        with pytest.raises(ArtifactError, match="has not finished"):
            TokenCache.open(tmp_path / "cache")


def test_a_file_that_vanishes_while_it_is_built_stops_the_build(
    tmp_path, codebook_path, photos_dir
):
    plan = factories.plan_cache(**settings(tmp_path))
    (photos_dir / "a/000.jpg").unlink()
    worker = factories.make_worker(tmp_path / "cache", plan)
    with pytest.raises(SourceError, match=r"a/000.jpg cannot be read"):
        worker.run(0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_the_units_does_not_change_a_byte(tmp_path, codebook_path, photos_dir, layout):
    factories.build_cache(**settings(tmp_path, layout=layout))
    other = settings(tmp_path, layout=layout, out=tmp_path / "other")
    plan = factories.plan_cache(**other)
    for unit in reversed(range(plan.num_units)):
        # Every unit by a worker of its own, as on a cluster.
        factories.make_worker(other["out"], plan).run(unit)
    factories.finish(other["out"])
    assert factories.contents(other["out"]) == factories.contents(tmp_path / "cache")


def test_nothing_in_a_cache_tells_when_it_was_built(tmp_path, codebook_path, photos_dir):
    factories.build_cache(**settings(tmp_path))
    first = factories.contents(tmp_path / "cache")
    for path in (tmp_path / "images").rglob("*.jpg"):
        os.utime(path, (1, 1))
    (tmp_path / "cache").rename(tmp_path / "first")
    factories.build_cache(**settings(tmp_path))
    assert factories.contents(tmp_path / "cache") == first


def test_a_tar_and_a_folder_of_the_same_images_give_the_same_shard(
    tmp_path, codebook_path, photos_dir
):
    images = factories.contents(photos_dir)
    factories.write_tar(tmp_path / "images.tar", sorted(images.items(), reverse=True))
    shards = []
    for source, changes in ((photos_dir, {"unit_size": 64}), (tmp_path / "images.tar", {})):
        out = tmp_path / f"from_{source.name}"
        options = {"unit_size": None, "images": str(source), "out": out} | changes
        factories.build_cache(**settings(tmp_path, **options))
        with TokenCache.open(out) as cache:
            shards.append([(s.key, s.image, s.token_ids.tobytes()) for s in cache])
    assert shards[0] == shards[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": (0.5, 0.2)}, "scale must be"),
        ({"ratio": (0.0, 1.0)}, "ratio must be"),
        ({"num_views": 0}, "num_views"),
        ({"jpeg_quality": 0}, "jpeg_quality"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(
    tmp_path, codebook_path, photos_dir, changes, message
):
    with pytest.raises(ConfigError, match=message):
        factories.plan_cache(**settings(tmp_path, **changes))
    assert not (tmp_path / "cache").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_on_ray_give_the_same_bytes_as_one_process(tmp_path, codebook_path, photos_dir):
    factories.build_cache(**settings(tmp_path, out=tmp_path / "alone"))
    told = []
    summary = build.run(
        build.BuildOptions(
            **settings(tmp_path), device="cpu", cluster=ClusterOptions(num_workers=2)
        ),
        lambda report, total: told.append((report.unit, total)),
    )
    assert factories.contents(tmp_path / "cache") == factories.contents(tmp_path / "alone")
    assert summary.num_units_kept == 0
    assert sorted(told) == [(0, 5), (1, 5), (2, 5)]


def test_plain_tools_read_a_finished_cache(tmp_path, codebook_path, photos_dir):
    factories.build_cache(**settings(tmp_path))
    shard = tmp_path / "cache/shards/000000.tar"
    listed = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [
        f"a/00{i}.{extension}"
        for i in (0, 2)
        for extension in ("jpg", "json", "tokens.npy", "views.npy")
    ]
    with tarfile.open(shard) as tar:
        tokens = np.load(io.BytesIO(tar.extractfile("a/000.tokens.npy").read()))
    assert tokens.shape == (3, 4, 4)
    assert tokens.dtype == np.uint16
    assert not list(Path(tmp_path / "cache").rglob(".*"))


def test_a_feature_tokenizer_builds_and_verifies(tmp_path, photos_dir):
    from cache_builder.formats import Codebook
    from cache_builder.tokenizers.features import FeatureOptions, make_extractor

    features = make_extractor(
        FeatureOptions("timm:resnet10t", image_size=64, layer="2", random_weights_seed=0),
        torch.device("cpu"),
    )
    pixels = torch.from_numpy(draw_photo(0, 64, 64)).permute(2, 0, 1)[None]
    centroids = features(pixels)[0, ::4].numpy()[None].copy()
    Codebook(
        centroids,
        np.ones(centroids.shape[:2], np.int64),
        metric="l2",
        pixel_rule=features.pixel_rule,
        extractor=features.spec,
    ).save(tmp_path / "codebook.safetensors")
    manifest = factories.build_cache(**settings(tmp_path))
    assert manifest.grid == (8, 8)
    report = verify(tmp_path / "cache", retokenize=5, device="cpu")
    assert report.problems == []
    (again,) = report.retokenized.values()
    assert (again.num_tokens, again.num_different) == (5 * 3 * 64, 0)
    plan = factories.read(BuildPlan, tmp_path / "cache", "plan.json")
    assert plan.spec.fingerprint == manifest.fingerprint
