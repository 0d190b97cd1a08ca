"""A sample depends on the seed and the keys, and on disk it is whole or done again."""

import json
import logging
import threading

import numpy as np
import pytest
import torch

from cache_builder import sampling
from cache_builder.errors import ConfigError
from cache_builder.formats.codebook_header import PixelRule
from cache_builder.formats.manifest import SourceInfo
from cache_builder.formats.plan import PlanRow, PlanUnit
from cache_builder.formats.views import centre_square
from cache_builder.imaging import apply_view, decode, patchify
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.sampling import (
    SampleOptions,
    SampleWorker,
    draw_sample,
    held_out_keys,
    plan_draw,
    smallest,
)
from cache_builder.sources import Listing, open_source
from cache_builder.tokenizers.features import FeatureOptions, make_extractor
from tests import factories

PIXEL = FeatureOptions("pixel", image_size=16, patch_size=4)
MODEL = FeatureOptions("timm:test_vit", image_size=64, random_weights_seed=0)
CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path):
    """A hundred pictures in two folders, and a few files that are none."""
    content = factories.patch_images(100)
    content |= {"a/bad.png": b"text", "b/bad.png": b""}
    return factories.write_folder(tmp_path / "images", content)


def scan(images):
    return open_source(str(images)).scan(None)


def drawn(images, **options):
    rule = make_extractor(PIXEL, CPU).pixel_rule
    draws = plan_draw(scan(images), rule, SampleOptions(**({"budget": None} | options)))
    return {
        row.key: (num_patches, held_out)
        for draw in draws
        for row, num_patches, held_out in zip(
            draw.unit.rows, draw.num_patches, draw.held_out, strict=True
        )
    }


def fitted(images, **options):
    return {key: n for key, (n, held_out) in drawn(images, **options).items() if not held_out}


def worker(images, features=PIXEL, dtype="float16"):
    extractor = make_extractor(features, CPU)
    return SampleWorker(str(images), extractor.spec, extractor.pixel_rule, "cpu", dtype, 0)


def test_one_key_in_twenty_is_held_out_whatever_the_order():
    keys = [f"key{number}" for number in range(105)]
    held_out = held_out_keys(keys, 0)
    assert len(held_out) == 5
    assert held_out_keys(keys[::-1], 0) == held_out
    assert held_out_keys(keys, 1) != held_out
    assert held_out_keys(keys[:19], 0) == frozenset()


def test_the_smallest_of_parts_are_the_smallest_of_the_whole():
    keys = [f"key{number}" for number in range(1000)]
    parts = [keys[start::7] for start in range(7)]
    merged = smallest((key for part in parts for key in smallest(part, 30, 3)), 30, 3)
    assert merged == smallest(keys, 30, 3)


def test_held_out_images_are_never_fitted(images):
    keys = [row.key for unit in scan(images).units for row in unit.rows]
    chosen = drawn(images)
    held_out = {key for key, (_, is_held_out) in chosen.items() if is_held_out}
    assert held_out == held_out_keys(keys, 0)
    assert len(held_out) == 5
    assert chosen.keys() == set(keys)


@pytest.mark.parametrize(
    ("budget", "num_images", "per_image"),
    [(10**6, 97, {16}), (16, 1, {16}), (100, 7, {14, 15}), (1536, 96, {16}), (1552, 97, {16})],
)
def test_many_images_are_sampled_before_many_patches_of_one(images, budget, num_images, per_image):
    found = fitted(images, budget=budget)
    assert len(found) == num_images
    assert set(found.values()) == per_image
    assert sum(found.values()) == min(budget, 97 * 16)


def test_patches_per_image_say_how_many_images_a_budget_takes(images):
    found = fitted(images, budget=100, patches_per_image=3)
    assert len(found) == 34
    assert sum(found.values()) == 100
    assert set(fitted(images, patches_per_image=3).values()) == {3}
    with pytest.raises(ConfigError, match="is 17, but an image has 16 patches"):
        fitted(images, patches_per_image=17)


def test_a_sample_of_all_takes_every_patch(images):
    assert set(fitted(images).values()) == {16}
    assert len(fitted(images)) == 97


def test_so_many_images_of_each_class_are_taken_whole(images):
    listing = scan(images)
    labels = {row.key: row.label for unit in listing.units for row in unit.rows}
    found = fitted(images, images_per_class=7)
    assert sorted(labels[key] for key in found) == [0] * 7 + [1] * 7
    assert set(found.values()) == {16}
    assert set(fitted(images, images_per_class=7, patches_per_image=2).values()) == {2}
    assert len(fitted(images, images_per_class=10**6)) == 97


def listing_of(num_classes, num_images):
    """A listing of images that nobody reads."""
    rows = tuple(
        PlanRow(key=f"{label:04d}/{image:05d}", source="", label=label)
        for label in range(num_classes)
        for image in range(num_images)
    )
    info = SourceInfo(kind="folder", location="/nowhere", num_samples=len(rows))
    return Listing(info, [PlanUnit(unit=0, rows=rows)], (), len(rows))


def test_the_sample_of_ccvit_is_fifty_whole_images_of_each_of_a_thousand_classes():
    options = SampleOptions(budget=None, images_per_class=50, seed=1)
    draws = plan_draw(listing_of(1000, 60), PixelRule(size=224, patch_size=16), options)
    patches = [
        num
        for draw in draws
        for num, held_out in zip(draw.num_patches, draw.held_out, strict=True)
        if not held_out
    ]
    assert len(patches) == 50_000
    assert sum(patches) == 9_800_000


def test_the_sample_of_k_clip_is_512_patches_per_centroid():
    rule = PixelRule(size=448, patch_size=32)
    draws = plan_draw(listing_of(1000, 300), rule, SampleOptions(budget=512 * 8192))
    patches = sum(
        num
        for draw in draws
        for num, held_out in zip(draw.num_patches, draw.held_out, strict=True)
        if not held_out
    )
    assert patches == 4_194_304
    assert max(sum(draw.num_patches) for draw in draws) <= (1 << 15) + 16


def test_images_per_class_need_classes(tmp_path):
    flat = factories.write_folder(tmp_path / "flat", {"a.png": b"", "b.png": b""})
    with pytest.raises(ConfigError, match="--images-per-class needs a class for every image"):
        drawn(flat, images_per_class=3)


def test_the_seed_chooses_the_images(images):
    assert fitted(images, budget=160) == fitted(images, budget=160)
    assert fitted(images, budget=160).keys() != fitted(images, budget=160, seed=1).keys()


def test_one_image_is_fitted_rather_than_held_out(tmp_path):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(1))
    assert list(drawn(images, budget=10).values()) == [(10, False)]


def test_samples_do_not_depend_on_how_the_source_is_cut_into_units(images):
    listing = scan(images)
    rule = make_extractor(PIXEL, CPU).pixel_rule
    rows = [row for unit in listing.units for row in unit.rows]
    found = []
    for size in (7, 40, len(rows)):
        units = [
            PlanUnit(unit=number, rows=tuple(rows[start : start + size]))
            for number, start in enumerate(range(0, len(rows), size))
        ]
        draws = plan_draw(listing._replace(units=units), rule, SampleOptions(budget=1000))
        samples = [worker(images).run(draw) for draw in draws]
        found.append(
            [np.concatenate([getattr(s, name) for s in samples]) for name in ("points", "held_out")]
        )
    for points, held_out in found[1:]:
        np.testing.assert_array_equal(points, found[0][0])
        np.testing.assert_array_equal(held_out, found[0][1])


def test_samples_are_patches_of_the_centred_square(tmp_path):
    images = factories.write_folder(tmp_path / "images", factories.photo_images(3))
    rule = make_extractor(PIXEL, CPU).pixel_rule
    (draw,) = plan_draw(scan(images), rule, SampleOptions(budget=None, patches_per_image=16))
    sample = worker(images).run(draw)
    expected = []
    for row in draw.unit.rows:
        picture = decode((images / row.source).read_bytes())
        view = apply_view(picture, centre_square(tuple(picture.shape[-2:])), 16)
        expected.append(patchify(view[None], 4)[0])
    np.testing.assert_array_equal(sample.points, torch.cat(expected))
    assert sample.points.dtype == np.uint8
    assert len(sample.held_out) == 0


def test_bad_images_are_counted_and_named(images, caplog):
    rule = make_extractor(PIXEL, CPU).pixel_rule
    draws = plan_draw(scan(images), rule, SampleOptions(budget=None))
    with caplog.at_level(logging.WARNING):
        samples = [worker(images).run(draw) for draw in draws]
    assert sum(sample.num_skipped for sample in samples) == 2
    assert "left out a/bad.png: not an image" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_are_stored_as_asked_for(images, dtype):
    extractor = make_extractor(MODEL, CPU)
    (draw, *_) = plan_draw(scan(images), extractor.pixel_rule, SampleOptions(budget=40))
    sample = worker(images, MODEL, dtype).run(draw)
    assert sample.points.dtype == np.dtype(dtype)
    row = draw.unit.rows[draw.held_out.index(False)]
    picture = decode((images / row.source).read_bytes())
    view = apply_view(picture, centre_square(tuple(picture.shape[-2:])), 64)
    features = extractor(view[None])[0].numpy()
    difference = np.abs(features[None] - sample.points[:1, None].astype(np.float32)).max(-1)
    assert difference.min() < 1e-2


def test_features_beyond_float16_are_refused_and_the_way_out_is_named(images):
    extractor = make_extractor(MODEL, CPU)
    (draw, *_) = plan_draw(scan(images), extractor.pixel_rule, SampleOptions(budget=40))
    sampler = worker(images, MODEL)
    for parameter in sampler._extractor._model.norm.parameters():
        parameter.data.fill_(1e5)
    with pytest.raises(ConfigError, match=r"by timm:test_vit reach [\d,]+, too much for float16"):
        sampler.run(draw)
    for parameter in sampler._extractor._model.norm.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(ConfigError, match=r"The features of .* hold NaN or infinity"):
        sampler.run(draw)


def test_what_is_whole_in_a_store_is_kept_and_what_is_damaged_is_done_again(images, tmp_path):
    extractor = make_extractor(PIXEL, CPU)
    options = SampleOptions(budget=500, cluster=ClusterOptions(num_workers=0))
    store = tmp_path / "sample"
    first = draw_sample(scan(images), extractor, options, store)
    content = factories.contents(store)
    assert (first.num_units_kept, first.num_images) == (0, 32 - first.num_skipped)
    units = sorted(store.glob("*[0-9].npy"))
    assert len(units) > 1
    factories.flip_byte(units[0])
    (store / f"{units[1].stem}.json").unlink()
    told = []
    again = draw_sample(
        scan(images), extractor, options, store, progress=lambda *step: told.append(step)
    )
    assert again.num_units_kept == len(units) - 2
    assert factories.contents(store) == content
    assert told[0][0] > 0
    assert told[-1][0] == told[-1][1]


def test_no_task_holds_more_than_fits_a_message(images, monkeypatch):
    whole = drawn(images)
    monkeypatch.setattr("cache_builder.sampling._MAX_PATCHES_PER_TASK", 50)
    draws = plan_draw(scan(images), make_extractor(PIXEL, CPU).pixel_rule, SampleOptions(None))
    assert max(sum(draw.num_patches) for draw in draws) <= 64
    assert [draw.unit.unit for draw in draws] == list(range(len(draws)))
    assert drawn(images) == whole


def test_a_unit_of_bad_images_alone_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr("cache_builder.sampling._MAX_PATCHES_PER_TASK", 16)
    content = factories.patch_images(3) | {"a/bad.png": b"text"}
    images = factories.write_folder(tmp_path / "images", content)
    options = SampleOptions(None, cluster=ClusterOptions(num_workers=0))
    store = tmp_path / "sample"
    (store / ".sample.json.0.tmp").parent.mkdir()
    (store / ".sample.json.0.tmp").write_text("{")  # of a fit that was killed
    sample = draw_sample(scan(images), make_extractor(PIXEL, CPU), options, store)
    assert (len(sample.points), sample.num_images, sample.num_skipped) == (48, 3, 1)
    assert len(sample.held_out) == 0


def test_another_sample_is_not_mixed_with_the_one_that_is_there(images, tmp_path):
    extractor = make_extractor(PIXEL, CPU)
    options = SampleOptions(budget=500, cluster=ClusterOptions(num_workers=0))
    store = tmp_path / "sample"
    draw_sample(scan(images), extractor, options, store)
    other = options._replace(budget=320)
    with pytest.raises(ConfigError, match=r"holds another sample: .*num_patches was 5\d\d, is 3"):
        draw_sample(scan(images), extractor, other, store)
    draw_sample(scan(images), extractor, other, store, replace=True)
    assert json.loads((store / "sample.json").read_bytes())["num_images"] == 21


def test_a_folder_that_is_no_sample_is_left_alone(images, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="it is not a sample"):
        draw_sample(scan(images), make_extractor(PIXEL, CPU), SampleOptions(10), tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["mine.txt"]


def test_cpus_of_a_worker_decode_at_once_and_the_sample_stays_the_same(
    images, tmp_path, monkeypatch
):
    extractor, threads = make_extractor(PIXEL, CPU), threading.Barrier(3)
    told = {"budget": 200, "cluster": ClusterOptions(num_workers=0)}
    alone = draw_sample(scan(images), extractor, SampleOptions(**told), tmp_path / "alone")
    first = iter(range(3))

    def wait_and_decode(data):
        if next(first, None) is not None:
            threads.wait(timeout=60)  # three images are decoded at once, or this breaks
        return decode(data)

    monkeypatch.setattr(sampling, "decode", wait_and_decode)
    told["cluster"] = ClusterOptions(num_workers=0, cpus_per_worker=3)
    together = draw_sample(scan(images), extractor, SampleOptions(**told), tmp_path / "together")
    assert factories.contents(tmp_path / "alone") == factories.contents(tmp_path / "together")
    assert together.num_images == alone.num_images > 0
