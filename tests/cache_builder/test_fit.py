"""A codebook depends on the images and the settings, and on nothing else."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cache_builder import fit
from cache_builder.console import fit_lines
from cache_builder.errors import ConfigError, SourceError
from cache_builder.formats import Codebook
from cache_builder.imaging import apply_view, decode, patchify
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.tokenizers.features import FeatureOptions
from tests import factories

PIXEL = FeatureOptions("pixel", image_size=16, patch_size=4)
HERE = ClusterOptions(num_workers=0)


@pytest.fixture
def images(tmp_path):
    """A hundred pictures in six colours, and a few files that are none."""
    content = factories.patch_images(100)
    content |= {"a/bad.png": b"text", "b/bad.png": b""}
    return factories.write_folder(tmp_path / "images", content)


def options(images, out, **changes):
    fields = {"images": str(images), "out": out, "k": 6, "features": PIXEL, "cluster": HERE}
    return fit.FitOptions(**(fields | changes))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_k_colours_are_found_and_the_file_does_not_depend_on_the_workers(tmp_path, images):
    told, iterations = [], []
    progress = fit.FitReports(
        lambda done, total: told.append((done, total)), lambda *step: iterations.append(step)
    )
    summary = fit.run(
        options(images, tmp_path / "two.safetensors", cluster=ClusterOptions(num_workers=2)),
        progress,
    )
    fit.run(options(images, tmp_path / "one.safetensors"))
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    codebook = Codebook.load(one)
    found = {tuple(centroid[::16]) for centroid in codebook.centroids[0].tolist()}
    assert found == {tuple(colour) for colour in factories.COLOURS.tolist()}
    assert (codebook.centroids.reshape(6, 3, 16) == codebook.centroids[0, :, ::16, None]).all()
    assert codebook.centroids.dtype == np.uint8
    assert summary.num_skipped == 2
    assert (summary.held_out[0].mse, summary.held_out_psnr) == (0, float("inf"))
    assert summary.usage.num_used == 6
    header = codebook.header
    # 256 patches per colour are those of 96 files, and both bad files are among them.
    assert header.num_images == 94
    assert header.num_points == codebook.counts.sum() == 94 * 16
    assert header.fit["images"] == str(images)
    assert header.objective[-1] == 0
    assert told[-1] == (101, 101)  # with five held out
    assert len(iterations) == len(header.objective) - 1


def test_a_source_of_bad_images_alone_is_refused(tmp_path):
    bad = factories.write_folder(tmp_path / "bad", {"a.jpg": b"", "b.jpg": b"text"})
    with pytest.raises(SourceError, match=r"Not one image of .* could be decoded"):
        fit.run(options(bad, tmp_path / "c.safetensors", cluster=HERE))
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"-k must be 1 to 65,535, not 0"),
        ({"k": 65_536}, r"-k must be 1 to 65,535, not 65,536"),
        ({"iterations": 0}, "--iterations, --restarts and --stages must be 1 or more"),
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


def photos(tmp_path, num=40):
    return factories.write_folder(tmp_path / "photos", factories.photo_images(num))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_codebook_does_not_depend_on_the_fit_workers(tmp_path):
    source = photos(tmp_path)
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for path, workers in zip(paths, (None, 1, 3), strict=True):
        fit.run(
            options(
                source, path, k=30, stages=2, fit_workers=workers, iterations=8,
                sample_dir=tmp_path / "sample",
            )
        )  # fmt: skip
    contents = {path.read_bytes() for path in paths}
    assert len(contents) == 1


def test_stages_quantise_what_is_left_over_and_say_how_well(tmp_path):
    path = tmp_path / "c.safetensors"
    summary = fit.run(options(photos(tmp_path), path, k=20, stages=3))
    codebook = Codebook.load(path)
    assert codebook.centroids.shape == (3, 20, 48)
    assert codebook.centroids.dtype == np.int16
    assert codebook.centroids[0].min() >= 0
    assert codebook.centroids[1:].min() < 0
    errors = [stage.mse for stage in summary.held_out]
    assert errors[2] < errors[1] < errors[0]
    cosines = [stage.cosine for stage in summary.held_out]
    assert cosines[0] < cosines[2] <= 1
    assert codebook.header.quality["held_out_stages"][2] == summary.held_out[2]._asdict()
    tokenizer = PatchTokenizer.load(path)
    picture = apply_view(
        decode(next((tmp_path / "photos").rglob("*.jpg")).read_bytes()), (0, 0, 16, 16, False), 16
    )[None]
    ids = tokenizer.encode(picture)
    assert ids.shape == (1, 4, 4, 3)
    one_stage = codebook.centroids[0][ids[0, 0, 0, 0]].astype(float)
    patch = patchify(picture, 4)[0, 0].numpy().astype(float)
    again = patchify(tokenizer.decode(ids), 4)[0, 0].numpy().astype(float)
    assert np.square(again - patch).sum() <= np.square(one_stage - patch).sum()


def test_a_fit_starts_from_a_codebook(tmp_path):
    source = photos(tmp_path)
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    fit.run(options(source, first, k=30, iterations=30))
    fit.run(options(source, again, k=30, iterations=5, warm_start=first))
    before, after = Codebook.load(first).header.objective, Codebook.load(again).header.objective
    assert after[0] == pytest.approx(before[-1])
    assert after[-1] <= before[-1]


def test_a_kept_sample_serves_fits_with_another_k_without_an_image(tmp_path):
    source = photos(tmp_path)
    store = tmp_path / "sample"
    fit.run(options(source, tmp_path / "a.safetensors", k=10, sample="all", sample_dir=store))
    for image in source.rglob("*.jpg"):
        image.write_bytes(b"gone")
    fit.run(options(source, tmp_path / "b.safetensors", k=20, sample="all", sample_dir=store))
    assert Codebook.load(tmp_path / "b.safetensors").header.num_images == 38


def advised_sample(summary, source):
    (line,) = (x for x in fit_lines(summary, str(source), Path("c")) if x.startswith("sample "))
    return line.partition("these settings")[2]


def test_what_a_fit_says_of_its_sample_holds_where_images_were_left_out(tmp_path):
    source = photos(tmp_path)
    for image in sorted(source.rglob("*.jpg"))[:10]:
        image.write_bytes(b"text")
    store = tmp_path / "sample"
    first = fit.run(options(source, tmp_path / "a.safetensors", k=2, sample_dir=store))
    assert advised_sample(first, source) == " and --sample 512 reads no image"
    shutil.copytree(store, tmp_path / "before")
    fit.run(options(source, tmp_path / "b.safetensors", k=3, sample=512, sample_dir=store))
    assert factories.contents(store) == factories.contents(tmp_path / "before")


def test_a_fit_without_error_says_so(tmp_path, images):
    summary = fit.run(options(images, tmp_path / "c.safetensors", restarts=4))
    lines = fit_lines(summary, str(images), tmp_path / "c.safetensors")
    assert "MSE 0, PSNR no error, cosine 1" in "\n".join(lines)


def test_images_per_class_are_a_sample_without_a_size(tmp_path):
    source = photos(tmp_path)
    settings = {"images_per_class": 5, "sample_dir": tmp_path / "sample"}
    summary = fit.run(options(source, tmp_path / "a.safetensors", k=2, **settings))
    assert advised_sample(summary, source) == " reads no image"


def test_a_codebook_of_another_size_is_no_start(tmp_path, images):
    start = tmp_path / "c.safetensors"
    factories.colour_codebook().save(start)
    with pytest.raises(ConfigError, match="has 1 stages of 6 centroids, but this fit makes 1 of 7"):
        fit.run(options(images, tmp_path / "d.safetensors", k=7, warm_start=start))


def test_a_codebook_of_another_model_is_no_start(tmp_path, images):
    start = tmp_path / "c.safetensors"
    book = factories.colour_codebook()
    spec = book.extractor.model_copy(update={"id": "timm:other", "layer": "blocks.3"})
    Codebook(
        book.centroids, book.counts, metric=book.metric, pixel_rule=book.pixel_rule, extractor=spec
    ).save(start)
    with pytest.raises(ConfigError, match=r"centroids of timm:other, blocks.3, but .* of pixel\."):
        fit.run(options(images, tmp_path / "d.safetensors", k=6, warm_start=start))


def test_a_number_of_patches_and_images_per_class_exclude_each_other(tmp_path, images):
    with pytest.raises(ConfigError, match="--sample and --images-per-class exclude each other"):
        fit.run(options(images, tmp_path / "d.safetensors", sample=100, images_per_class=2))
