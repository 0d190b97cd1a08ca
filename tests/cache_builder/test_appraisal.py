"""What `inspect --images` measures: on which images, and that it is what the definitions say."""

import json
import math

import numpy as np
import pytest
import torch

from cache_builder import appraisal, fit
from cache_builder.appraisal_table import appraisal_result, measures, picked_text, warnings
from cache_builder.errors import ConfigError, SourceError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from cache_builder.imaging import patchify
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.sampling import held_out_keys
from cache_builder.sources import open_source
from cache_builder.tokenizers.features import FeatureOptions
from tests import factories

OFF_COLOUR = 3  # how far the pictures are from the centroids


def appraise(codebook, images, **options):
    return appraisal.run(appraisal.AppraisalOptions(codebook, str(images), device="cpu", **options))


@pytest.fixture
def pictures(tmp_path):
    """30 pictures in known colours; every value but 0 and 255 of them is off by three."""
    folder = {}
    for i in range(30):
        pixels = factories.draw_patches(factories.random_ids(i)).astype(int)
        pixels += np.where(pixels == 0, OFF_COLOUR, -OFF_COLOUR)
        folder[f"{'ab'[i % 2]}/{i:03d}.png"] = factories.encode(pixels.astype(np.uint8))
    return factories.write_folder(tmp_path / "pictures", folder)


def all_ids():
    """Return the ids of the pictures in the order of their keys: a/000, a/002, ..., b/001, ..."""
    order = [*range(0, 30, 2), *range(1, 30, 2)]
    return np.stack([factories.random_ids(i) for i in order])


def test_ids_counts_and_errors_are_those_of_the_pictures(codebook_path, pictures):
    found = appraise(codebook_path, pictures)
    assert np.array_equal(found.token_ids, all_ids())
    assert found.counts.tolist() == [np.bincount(all_ids().ravel(), minlength=6).tolist()]
    assert found.objective == OFF_COLOUR**2 * 48
    assert found.mse == OFF_COLOUR**2
    expected = 10 * math.log10(255**2 / OFF_COLOUR**2)
    assert found.psnr_db == pytest.approx(expected)
    assert found.mean_image_psnr_db == pytest.approx(expected)
    assert (found.near_tie_share, found.exact_tie_share) == (0, 0)
    assert found.labels.num_classes == 2
    assert found.stages[0].usage_in_fit is None
    assert json.loads(json.dumps(appraisal_result(found))) == appraisal_result(found)


def test_pooled_and_mean_psnr_differ_where_errors_do(tmp_path, codebook_path):
    red = factories.draw_patches(np.zeros((4, 4), int))
    levels = {"a.png": red - np.uint8([10, 0, 0]), "b.png": red - np.uint8([40, 0, 0])}
    folder = {name: factories.encode(pixels) for name, pixels in levels.items()}
    folder["exact.png"] = factories.encode(red)
    found = appraise(codebook_path, factories.write_folder(tmp_path / "reds", folder))
    peak = 255**2
    assert found.psnr_db == pytest.approx(10 * math.log10(peak / ((100 + 1600) / 9)))
    each = [10 * math.log10(peak / (error / 3)) for error in (100, 1600)]
    assert found.mean_image_psnr_db == pytest.approx(np.mean(each))


def test_a_reconstruction_without_error_has_no_finite_psnr(tmp_path, codebook_path):
    images = factories.write_folder(tmp_path / "images", factories.patch_images(4))
    found = appraise(codebook_path, images)
    assert found.psnr_db == found.mean_image_psnr_db == math.inf
    assert appraisal_result(found)["psnr_db"] is None
    assert [m.value for m in measures(found) if m.name == "PSNR"] == ["no error"]


def test_the_source_of_the_fit_is_measured_on_what_the_fit_held_out(tmp_path, pictures):
    more = factories.write_folder(pictures, factories.patch_images(60))
    listing = open_source(str(more)).scan(None)
    keys = [row.key for unit in listing.units for row in unit.rows]
    fit = {"images": str(more.resolve()), "seed": 7}
    path = factories.write_codebook(tmp_path / "c.safetensors", fit=fit)
    found = appraise(path, f"{more}/../{more.name}")
    assert {row.key for row in found.rows} == held_out_keys(keys, 7)
    assert picked_text(found) == "3 of 3 images, held out by the fit, whose source this is"


def test_another_source_is_measured_whole_or_to_the_limit(tmp_path, pictures):
    fit = {"images": str(tmp_path / "elsewhere"), "seed": 0}
    path = factories.write_codebook(tmp_path / "c.safetensors", fit=fit)
    whole, part = appraise(path, pictures), appraise(path, pictures, max_images=10)
    assert len(whole.rows) == 30
    assert len(part.rows) == 10
    assert picked_text(part) == "10 of 30 images, of another source than that of the fit"
    fewer = appraise(path, pictures, max_images=9)
    assert {row.key for row in fewer.rows} < {row.key for row in part.rows}


def test_a_source_of_which_nothing_was_held_out_is_refused(tmp_path):
    images = factories.write_folder(tmp_path / "few", factories.patch_images(5))
    fit = {"images": str(images.resolve()), "seed": 0}
    path = factories.write_codebook(tmp_path / "c.safetensors", fit=fit)
    with pytest.raises(ConfigError, match=r"of 5 images the fit held out none. Pass --images that"):
        appraise(path, images)


def test_bad_images_are_left_out_with_their_reasons(codebook_path, pictures):
    factories.write_folder(pictures, {"a/bad.png": b"", "b/worse.jpg": b"no picture"})
    found = appraise(codebook_path, pictures)
    assert [tuple(skipped) for skipped in found.skipped] == [
        ("a/bad.png", "the file is empty"),
        ("b/worse.jpg", "not an image of a known format (JPEG, PNG, WebP, GIF, BMP, TIFF)"),
    ]
    assert np.array_equal(found.token_ids, all_ids())
    assert picked_text(found).endswith("; 2 left out")


def test_a_source_of_nothing_but_bad_images_is_refused(tmp_path, codebook_path):
    images = factories.write_folder(tmp_path / "bad", {"a/bad.png": b""})
    with pytest.raises(SourceError, match=r"Not one of 1 images .* a/bad.png: the file is empty"):
        appraise(codebook_path, images)


def test_label_measures_are_absent_without_labels_or_with_one_class(tmp_path, codebook_path):
    pictures = list(factories.patch_images(4).values())
    flat = {f"{i}.png": data for i, data in enumerate(pictures)}
    for name, folder, note in (
        ("flat", flat, "the images have no labels"),
        ("one", {f"a/{key}": data for key, data in flat.items()}, "are of one class"),
    ):
        found = appraise(codebook_path, factories.write_folder(tmp_path / name, folder))
        assert found.labels is None
        assert any(note in line for line in warnings(found))
        assert appraisal_result(found)["labels"] is None
        assert not any("mutual" in measure.name for measure in measures(found))


def test_exact_ties_of_pixels_are_counted(tmp_path):
    # Black and 4 are equally far from 2; 100 is near neither.
    colours = np.repeat(np.uint8([[0], [4], [100]]), 3, axis=1)
    path = factories.write_codebook(tmp_path / "c.safetensors", colours=colours)
    ids = np.zeros((4, 4), int)
    ids[0] = 1  # four patches of the one grey, twelve of the other
    greys = np.repeat(np.uint8([[2], [99]]), 3, axis=1)
    picture = factories.encode(factories.draw_patches(ids, colours=greys))
    found = appraise(path, factories.write_folder(tmp_path / "i", {"a.png": picture}))
    assert found.exact_tie_share == found.near_tie_share == 12 / 16
    assert found.counts.tolist() == [[12, 0, 4]]


def test_one_centroid_has_no_ties_to_count(tmp_path):
    path = factories.write_codebook(tmp_path / "c.safetensors", colours=np.uint8([[9, 9, 9]]))
    images = factories.write_folder(tmp_path / "images", factories.patch_images(4))
    found = appraise(path, images)
    assert found.near_tie_share is None
    assert found.labels.mutual_information.value == pytest.approx(0)
    assert found.labels.tcas_reconstructed.value == pytest.approx(1)


def test_stages_are_counted_each_and_measured_together(tmp_path, pictures):
    rng = np.random.default_rng(0)
    first = np.repeat(factories.COLOURS.astype(np.int16), 16, axis=1)
    second = rng.integers(-4, 5, (6, 48)).astype(np.int16)
    codebook = Codebook(
        np.stack([first, second]),
        np.ones((2, 6), np.int64),
        metric="l2",
        pixel_rule=PixelRule(size=factories.SIZE, patch_size=factories.PATCH),
        extractor=ExtractorSpec(id="pixel"),
        num_points=6,
    )
    codebook.save(tmp_path / "c.safetensors")
    found = appraise(tmp_path / "c.safetensors", pictures)

    squares, clipped, counts = 0, 0, np.zeros(6, int)
    for ids in all_ids():
        pixels = factories.draw_patches(ids).astype(int)
        pixels += np.where(pixels == 0, OFF_COLOUR, -OFF_COLOUR)
        patches = patchify(torch.from_numpy(pixels).permute(2, 0, 1)[None], factories.PATCH)[0]
        for patch, token_id in zip(patches.numpy(), ids.ravel(), strict=True):
            left = patch - first[token_id]
            errors = np.square(left - second).sum(1)
            counts[errors.argmin()] += 1
            squares += errors.min()
            again = (first[token_id] + second[errors.argmin()]).clip(0, 255)
            clipped += np.square(patch - again).sum()
    assert np.array_equal(found.token_ids, all_ids())
    assert found.counts[1].tolist() == counts.tolist()
    assert found.objective == squares / (30 * 16)
    assert found.psnr_db == pytest.approx(10 * math.log10(255**2 * 30 * 16 * 48 / clipped))
    assert [stage.idle_in_fit.num_single for stage in found.stages] == [6, 6]
    names = [measure.name for measure in measures(found)]
    assert "perplexity, stage 1" in names
    assert "perplexity, stage 2" in names


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_features_have_no_psnr_and_no_exact_ties(tmp_path, metric):
    codebook = factories.feature_codebook(metric=metric)
    codebook.save(tmp_path / "c.safetensors")
    images = factories.write_folder(tmp_path / "images", factories.photo_images(4))
    found = appraise(tmp_path / "c.safetensors", images)
    assert found.psnr_db is None
    assert found.exact_tie_share is None
    assert 0 < found.objective == pytest.approx(found.mse * codebook.dim)
    assert found.counts.sum() == found.token_ids.size == 4 * 64
    if metric == "cosine":
        assert found.objective < 4  # the largest squared distance of unit vectors


def test_ties_of_a_large_codebook_are_looked_for_in_one_patch_in_eleven(tmp_path, pictures):
    colours = np.random.default_rng(0).integers(0, 256, (1025, 3)).astype(np.uint8)
    colours[512:1024] = colours[:512]  # all but the last are twins
    large = factories.write_codebook(tmp_path / "large.safetensors", colours=colours)
    small = factories.write_codebook(tmp_path / "small.safetensors", colours=colours[:1024])
    one, all_of_them = appraise(large, pictures), appraise(small, pictures)
    assert all_of_them.num_tie_patches == 480
    assert all_of_them.exact_tie_share == 1
    assert 480 / 11 < one.num_tie_patches < 480 / 11 + 2
    assert one.exact_tie_share > 0.9


@pytest.mark.parametrize("stages", [1, 2])
def test_an_appraisal_of_the_fits_own_source_finds_the_error_that_the_fit_held_out(
    tmp_path, stages
):
    images = factories.write_folder(tmp_path / "images", factories.photo_images(60))
    out = tmp_path / "c.safetensors"
    summary = fit.run(
        fit.FitOptions(
            images=str(images),
            out=out,
            k=8,
            features=FeatureOptions("pixel", image_size=32, patch_size=8),
            stages=stages,
            sample="all",
            seed=3,
            cluster=ClusterOptions(num_workers=0),
        )
    )
    found = appraise(out, images)
    assert len(found.rows) == 3
    assert found.mse == pytest.approx(summary.held_out[-1].mse)
    assert [stage.usage_in_fit.num_tokens for stage in found.stages] == [57 * 16] * stages
