"""The page of a cache shows its views as boxes and its ids as colours, and holds all it shows."""

import base64
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_builder import build_log, cache_page, cache_survey, pictures
from cache_builder.cache_facts import facts
from cache_builder.errors import ConfigError, ImageError
from cache_builder.formats import TokenCache
from tests import factories
from tests.cache_builder.test_build_log import a_run

_VOID = {"meta", "img", "br", "link"}


class Balance(HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def build(tmp_path, codebook, images=None, **settings):
    images = images or factories.photo_images(6, height=40, width=56)
    folder = factories.write_folder(tmp_path / "images", images)
    settings = {"num_views": 3} | settings
    factories.build_cache(images=str(folder), codebook=codebook, out=tmp_path / "cache", **settings)
    return tmp_path / "cache"


def write(path, **options):
    page = path.parent / "page.html"
    with TokenCache.open(path) as cache:
        found = cache_survey.run(cache, num_examples=cache_page.NUM_EXAMPLES)
        problems = cache_page.write(page, found, cache, **options)
    return found, problems, page.read_text()


def pictures_of(text):
    return {
        html.unescape(alt): np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for alt, data in re.findall(r'alt="([^"]*)" src="data:image/\w+;base64,([^"]+)"', text)
    }


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
@pytest.mark.parametrize("images_in_cache", ["original", "resized", "none"])
def test_every_view_is_shown_with_its_pixels_ids_and_centroids(
    tmp_path, codebook_path, layout, images_in_cache
):
    path = build(
        tmp_path, codebook_path, layout=layout, images_in_cache=images_in_cache,
        resized_short_side=32,
    )  # fmt: skip
    _, problems, text = write(path)
    found = pictures_of(text)
    assert problems == []
    assert len(found) == 6 * 3 * 3
    with TokenCache.open(path) as cache:
        for sample in cache:
            for number, ids in enumerate(sample.token_ids):
                colours = found[f"token ids of view {number} of {sample.key}"]
                assert np.array_equal(colours, pictures.token_map(ids, 4))
                again = found[f"centroids of view {number} of {sample.key}"]
                assert again.shape == (16, 16, 3)
            if sample.image:
                view = found[f"view 0 of {sample.key}"].astype(float)
                expected = pictures.view_pixels(cache, sample, 0)
                assert np.abs(view - expected).mean() < 12  # JPEG


def test_boxes_lie_where_the_views_lie(tmp_path, codebook_path):
    path = build(tmp_path, codebook_path, {"0.jpg": factories.photo_images(1)["a/000.jpg"]})
    _, _, text = write(path)
    (drawing,) = re.findall(r'<svg class="boxes".*?</svg>', text)
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing).groups())
    assert width / height == pytest.approx(64 / 48, abs=0.01)
    scale = width / 64
    with TokenCache.open(path) as cache:
        views = cache[0].views.tolist()
    for number, (top, left, high, wide, hflip) in enumerate(views):
        colour = pictures.view_colour(number)
        box = re.search(
            rf'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" fill="none" '
            rf'stroke="{colour}" stroke-width="4"( stroke-dasharray)?',
            drawing,
        )
        x, y, across, down = (float(box[group]) for group in range(1, 5))
        assert (x / scale, y / scale) == pytest.approx((left, top), abs=0.6)
        assert (across / scale, down / scale) == pytest.approx((wide, high), abs=0.6)
        assert bool(box[5]) == bool(hflip)
        assert f">{number}{chr(0x21C4) if hflip else ''}</text>" in drawing


def test_the_page_is_well_formed_and_needs_no_network_and_no_script(tmp_path, codebook_path):
    names = {"a/<b>&.jpg": factories.photo_images(1)["a/000.jpg"], "c/x\"'.jpg": b"<bad>"}
    path = build(tmp_path, codebook_path, names)
    build_log.append(str(path), a_run(outcome="failed", error="<script>"))
    _, _, text = write(path)
    checker = Balance()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert not re.search(r"https?://|<script|<link|@import|url\(|<b>&", text)
    assert set(re.findall(r'(?:src|href)="(.{10})', text)) == {"data:image"}


def test_the_page_holds_the_facts_the_labels_the_builds_and_what_was_skipped(
    tmp_path, codebook_path
):
    images = factories.photo_images(5) | {"b/bad.jpg": b"", "c/worse.jpg": b"no"}
    path = build(tmp_path, codebook_path, images)
    build_log.append(str(path), a_run())
    found, _, text = write(path)
    for fact in facts(found):
        for part in fact[:3]:
            assert html.escape(part) in text, fact
    for words in (
        "b/bad.jpg", "the file is empty", "2 could not be tokenised", "<span>c</span>",
        "1 of 3 classes have no image", "2026-01-02 03:04:05", "2 workers on one (cpu)",
        "tokens by rank of the id", "5 images/s",
    ):  # fmt: skip
        assert words in text, words


def test_images_that_have_moved_are_found_with_images(tmp_path, codebook_path):
    path = build(tmp_path, codebook_path, images_in_cache="none")
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    found, problems, text = write(path)
    assert len(problems) == 1
    assert "their folder" in problems[0]
    assert "6 of these images cannot be shown" in text
    assert "--images" in text
    assert "token ids of view 0 of a/000" in text
    assert '<rect class="blank"' in text
    assert len(pictures_of(text)) == 6 * 3 * 2
    _, problems, text = write(path, images=str(tmp_path / "elsewhere"))
    assert problems == []
    assert "cannot be shown" not in text
    assert len(pictures_of(text)) == 6 * 3 * 3
    assert found.num_images == 6


def test_one_image_that_is_gone_leaves_the_others(tmp_path, codebook_path):
    path = build(tmp_path, codebook_path, images_in_cache="none")
    (tmp_path / "images/a/000.jpg").unlink()
    _, problems, text = write(path)
    assert "a/000.jpg cannot be read" in problems[0]
    assert "1 of these images cannot be shown" in text
    assert len(pictures_of(text)) == 5 * 3 * 3 + 3 * 2


def test_an_image_that_is_damaged_in_its_cache_is_not_looked_for_elsewhere(
    tmp_path, codebook_path, monkeypatch
):
    path = build(tmp_path, codebook_path)

    def refuse(data):
        raise ImageError("truncated")

    monkeypatch.setattr(cache_page, "decode", refuse)
    _, problems, text = write(path)
    assert problems == ["truncated"]
    assert "run <code>patchcache verify</code>" in text
    assert "<code>--images</code>" not in text


def test_a_reconstruction_without_error_says_so(tmp_path, codebook_path):
    path = build(tmp_path, codebook_path, images=factories.patch_images(1), num_views=1)
    _, _, text = write(path)
    assert "reconstruction: no error" in text


def test_a_log_of_runs_without_images_is_not_called_missing(tmp_path, codebook_path):
    path = build(tmp_path, codebook_path)
    log = build_log.log_location(str(path))
    Path(log).unlink(missing_ok=True)
    for runs, value, meaning in (
        ([], "no log", "is not there"),
        ([0], "no rate", "none tokenised"),
    ):
        for number in runs:
            build_log.append(str(path), a_run(num_images=number))
        with TokenCache.open(path) as cache:
            (fact,) = (each for each in facts(cache_survey.run(cache)) if each.name == "build")
        assert fact.value == value
        assert log in fact.meaning
        assert meaning in fact.meaning


def test_a_cache_that_holds_its_images_takes_none(tmp_path, codebook_path):
    with pytest.raises(ConfigError, match="holds its images"):
        write(build(tmp_path, codebook_path), images=str(tmp_path))


def test_centroids_that_are_no_pictures_are_not_drawn_and_no_model_is_loaded(tmp_path):
    factories.feature_codebook().save(tmp_path / "c.safetensors")
    path = build(tmp_path, tmp_path / "c.safetensors", num_views=2)
    _, _, text = write(path)
    assert "view 1 of a/000 and its token ids" in text
    assert "centroids of" not in text


def test_many_classes_are_shown_by_the_largest_the_smallest_and_a_curve(tmp_path, codebook_path):
    image = next(iter(factories.patch_images(1).values()))
    names = {f"c{i:02d}/{j}.png": image for i in range(60) for j in range(1 + (i == 7))}
    _, _, text = write(build(tmp_path, codebook_path, names, num_views=1))
    assert "(28 classes between)" in text
    assert "images by rank of the class" in text
    assert text.index("<span>c07</span>") < text.index("<span>c00</span>")


def test_the_command_writes_the_page(patchcache, tmp_path, codebook_path):
    path = build(tmp_path, codebook_path, images_in_cache="none")
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    done = patchcache("inspect", path, "--page", tmp_path / "page.html")
    assert done.status == 0, done.err
    assert f"page         {tmp_path / 'page.html'}" in done.out.replace("\n", "")
    done = patchcache(
        "inspect", path, "--page", tmp_path / "page.html", "--images", tmp_path / "elsewhere"
    )
    assert done.status == 0, done.err
    assert "view 0 of a/000" in (tmp_path / "page.html").read_text()
