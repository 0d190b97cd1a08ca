"""The page of an appraisal holds all it shows, and the command that writes it."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from cache_builder import codebook_page
from cache_builder.appraisal import AppraisalOptions, run
from cache_builder.appraisal_table import measures
from cache_builder.errors import SourceError
from cache_builder.pictures import patch_in_its_place, usage_curve
from tests import factories


@pytest.fixture
def images(tmp_path):
    return factories.write_folder(tmp_path / "images", factories.patch_images(6))


def write_page(codebook, images, path):
    appraisal = run(AppraisalOptions(codebook, str(images), device="cpu"))
    codebook_page.write(path, appraisal, codebook.name)
    return appraisal, path.read_text()


def pictures_of(text):
    return {
        html.unescape(alt): np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for alt, data in re.findall(r'alt="([^"]*)" src="data:image/png;base64,([^"]+)"', text)
    }


def test_a_page_of_pixels_holds_every_measure_and_the_pictures(tmp_path, codebook_path, images):
    appraisal, text = write_page(codebook_path, images, tmp_path / "page.html")
    for measure in measures(appraisal):
        assert html.escape(measure.name) in text
        assert html.escape(measure.meaning) in text
    found = pictures_of(text)
    assert np.array_equal(found["a/000"], factories.draw_patches(factories.random_ids(0)))
    sheet = found["centroids, most frequent first"]
    most = factories.COLOURS[appraisal.counts[0].argmax()]
    assert np.array_equal(sheet[len(sheet) // 2, sheet.shape[1] // 12], most)


def test_a_page_needs_no_network_and_no_script(tmp_path, codebook_path, images):
    _, text = write_page(codebook_path, images, tmp_path / "page.html")
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert set(re.findall(r'src="(.{10})', text)) == {"data:image"}


def test_a_page_of_features_shows_patches_that_carry_the_ids(tmp_path):
    factories.feature_codebook().save(tmp_path / "c.safetensors")
    images = factories.write_folder(tmp_path / "images", factories.photo_images(6))
    appraisal, text = write_page(tmp_path / "c.safetensors", images, tmp_path / "page.html")
    counts = appraisal.counts[0]
    assert f"id {counts.argmax()}, {counts.max()} tokens" in text
    assert "a patch of a/000" in text
    assert "both, one over the other" in text


def test_a_photo_that_is_damaged_after_the_measurement_is_named(tmp_path, codebook_path, images):
    appraisal = run(AppraisalOptions(codebook_path, str(images), device="cpu"))
    (images / "a/000.png").write_bytes(b"text")
    with pytest.raises(SourceError, match=r"a/000\.png was measured and has changed since"):
        codebook_page.write(tmp_path / "page.html", appraisal, "c")
    assert not (tmp_path / "page.html").exists()


def test_names_of_files_cannot_write_html(tmp_path, codebook_path):
    name = "<img src=x>.png"
    data = next(iter(factories.patch_images(1).values()))
    images = factories.write_folder(tmp_path / "images", {name: data})
    _, text = write_page(codebook_path, images, tmp_path / "page.html")
    assert "<img src=x" not in text


def test_a_patch_is_framed_in_its_place():
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[8:16, 16:24] = 200
    cut = patch_in_its_place(picture, 1, 2, 8)
    assert cut.shape == (24, 24, 3)
    assert (cut[8:16, 8:16] == 200).all()
    assert (cut[7, 7:17] == 255).all()
    assert (patch_in_its_place(picture, 0, 0, 8)[0, 0] == 128).all()  # beyond the border


def test_the_curve_of_use_is_drawn_of_any_counts():
    for counts in ([0], [7], [0, 0, 0], [1, 1, 5], range(5000)):
        points = re.search(r'points="([^"]+)"', usage_curve(np.array(counts)))[1].split()
        heights = [float(point.split(",")[1]) for point in points]
        assert len(points) > 1
        assert heights == sorted(heights)  # down the page is down the counts


def test_the_command_prints_a_table_or_json_and_writes_the_page(
    patchcache, tmp_path, codebook_path, images
):
    page = tmp_path / "page.html"
    done = patchcache("inspect", codebook_path, "--images", images, "--page", page)
    assert done.status == 0, done.err
    assert "6 of 6 images" in done.out
    assert "mutual information" in done.out
    assert page.stat().st_size > 1000
    done = patchcache("inspect", codebook_path, "--images", images, "--max-images", 4, "--json")
    assert json.loads(done.out)["num_images"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cache", "--images", "images"), "There is no codebook at cache"),
        (("codebook.safetensors", "--images", "nothing"), "nothing is not there"),
        (("codebook.safetensors", "--page", "page.html"), "--page shows a cache, or a codebook"),
        (("notes.safetensors", "--images", "images"), "cannot be read as a codebook"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    patchcache, monkeypatch, codebook_path, images, words, message
):
    monkeypatch.chdir(images.parent)
    (images.parent / "notes.safetensors").write_text("no codebook")
    done = patchcache("inspect", *words)
    assert done.status == 1
    assert message in done.err
    assert len(done.err.splitlines()) == 1
