"""A codebook depends on the images and the settings, and on nothing else."""

import logging
from functools import partial

import numpy as np
import pytest
import torch

from cache_builder import fit
from cache_builder.errors import ConfigError, SourceError
from cache_builder.formats import Codebook
from cache_builder.formats.manifest import PlanUnit
from cache_builder.formats.views import centre_square
from cache_builder.imaging import apply_view, decode, patchify
from cache_builder.ray_jobs import ClusterOptions
from cache_builder.sources import open_source
from cache_builder.tokenizers.features import FeatureOptions, make_extractor
from tests import factories

PIXEL = FeatureOptions("pixel", image_size=16, patch_size=4)
CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path):
    """A hundred pictures in six colours, and a few files that are none."""
    content = factories.patch_images(100)
    content |= {"a/bad.png": b"text", "b/bad.png": b""}
    return factories.write_folder(tmp_path / "images", content)


def options(images, out, **changes):
    fields = {"images": str(images), "out": out, "k": 6, "features": PIXEL}
    return fit.FitOptions(**(fields | changes))


def draw(listing, budget, seed=0):
    return fit._plan_draw(listing, make_extractor(PIXEL, CPU).pixel_rule, budget, seed)


def sampled(images, drawn, units):
    extractor = make_extractor(PIXEL, CPU)
    worker = fit.SampleWorker(str(images), extractor.spec, extractor.pixel_rule, "cpu", drawn)
    samples = [worker.run(unit) for unit in units]
    return tuple(
        np.concatenate([getattr(sample, name) for sample in samples])
        for name in ("points", "held_out")
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_k_colours_are_found_and_the_file_does_not_depend_on_the_workers(tmp_path, images):
    told, iterations = [], []
    progress = fit.Progress(
        lambda done, total: told.append((done, total)), lambda *step: iterations.append(step)
    )
    summary = fit.run(
        options(images, tmp_path / "one.safetensors", cluster=ClusterOptions(num_workers=1)),
        progress,
    )
    fit.run(options(images, tmp_path / "two.safetensors", cluster=ClusterOptions(num_workers=2)))
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    codebook = Codebook.load(one)
    found = {tuple(centroid[::16]) for centroid in codebook.centroids[0].tolist()}
    assert found == {tuple(colour) for colour in factories.COLOURS.tolist()}
    assert (codebook.centroids.reshape(6, 3, 16) == codebook.centroids[0, :, ::16, None]).all()
    assert codebook.centroids.dtype == np.uint8
    assert summary.num_skipped == 2
    assert (summary.held_out_mse, summary.held_out_psnr) == (0, float("inf"))
    assert summary.usage.num_used == 6
    header = codebook.header
    # 256 patches per colour are those of 96 files, and both bad files are among them.
    assert header.num_images == 94
    assert header.num_points == codebook.counts.sum() == 94 * 16
    assert header.fit["images"] == str(images)
    assert header.objective[-1] == 0
    assert told[-1] == (101, 101)  # with five held out
    assert len(iterations) == len(header.objective) - 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_source_of_bad_images_alone_is_refused(tmp_path):
    bad = factories.write_folder(tmp_path / "bad", {"a.jpg": b"", "b.jpg": b"text"})
    with pytest.raises(SourceError, match=r"Not one image of .* could be decoded"):
        fit.run(options(bad, tmp_path / "c.safetensors", cluster=ClusterOptions(num_workers=1)))
    assert not (tmp_path / "c.safetensors").exists()


def test_samples_do_not_depend_on_how_the_source_is_cut_into_units(images):
    listing = open_source(str(images)).scan(None)
    drawn = draw(listing, 1000)
    rows = [row for unit in listing.units for row in unit.rows]
    whole = sampled(images, drawn, [PlanUnit(unit=0, rows=tuple(rows))])
    for size in (7, 40):
        slices = [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]
        cut = sampled(images, drawn, [PlanUnit(unit=0, rows=part) for part in slices])
        for a, b in zip(cut, whole, strict=True):
            np.testing.assert_array_equal(a, b)


def test_samples_are_patches_of_the_centred_square(tmp_path):
    images = factories.write_folder(tmp_path / "images", factories.photo_images(3))
    listing = open_source(str(images)).scan(None)
    points, held_out = sampled(images, draw(listing, 10**6), listing.units)
    expected = []
    for row in listing.units[0].rows:
        picture = decode((images / row.source).read_bytes())
        view = apply_view(picture, centre_square(tuple(picture.shape[-2:])), 16)
        expected.append(patchify(view[None], 4)[0])
    np.testing.assert_array_equal(points, torch.cat(expected))
    assert len(held_out) == 0


@pytest.mark.parametrize(
    ("budget", "num_images", "per_image"),
    [(10**6, 97, 16), (16, 1, 16), (100, 7, 15), (1536, 96, 16)],
)
def test_many_images_are_sampled_before_many_patches_of_one(images, budget, num_images, per_image):
    listing = open_source(str(images)).scan(None)
    drawn = draw(listing, budget)
    assert (len(drawn.fitted), drawn.patches_per_image) == (num_images, per_image)
    assert len(drawn.fitted) * drawn.patches_per_image >= min(budget, 97 * 16)


def test_one_image_in_twenty_is_held_out_and_never_fitted(images):
    listing = open_source(str(images)).scan(None)
    drawn = draw(listing, 10**6)
    keys = {row.key for unit in listing.units for row in unit.rows}
    assert len(drawn.held_out) == 5
    assert drawn.held_out | drawn.fitted == keys
    assert not drawn.held_out & drawn.fitted


def test_the_seed_chooses_the_images(images):
    listing = open_source(str(images)).scan(None)
    assert draw(listing, 160) == draw(listing, 160)
    assert draw(listing, 160, seed=1).fitted != draw(listing, 160).fitted


def test_a_few_images_are_enough(tmp_path):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(1))
    drawn = draw(open_source(str(images)).scan(None), 10)
    assert (len(drawn.fitted), len(drawn.held_out)) == (1, 0)


def test_bad_images_are_counted_and_named(images, caplog):
    listing = open_source(str(images)).scan(None)
    extractor = make_extractor(PIXEL, CPU)
    worker = partial(fit.SampleWorker, str(images), extractor.spec, extractor.pixel_rule, "cpu")
    with caplog.at_level(logging.WARNING):
        samples = [worker(draw(listing, 10**6)).run(unit) for unit in listing.units]
    assert sum(sample.num_skipped for sample in samples) == 2
    assert "left out a/bad.png: not an image" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"-k must be 1 to 65,535, not 0"),
        ({"k": 65_536}, r"-k must be 1 to 65,535, not 65,536"),
        ({"iterations": 0}, "--iterations and --restarts must be 1 or more"),
        ({"device": "gpu"}, "Unknown device 'gpu'"),
        ({"features": FeatureOptions("clip")}, "Unknown features 'clip'"),
        ({"features": FeatureOptions("pixel", image_size=10)}, "not a multiple"),
    ],
)
def test_a_wrong_setting_is_refused_before_an_image_is_read(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        fit.run(options(tmp_path / "no_images_here", tmp_path / "c.safetensors", **changes))


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SourceError, match="is not there"):
        fit.run(options(tmp_path / "nowhere", tmp_path / "c.safetensors"))
