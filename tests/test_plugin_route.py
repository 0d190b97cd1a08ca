"""A tokenizer that was learned elsewhere, from its weights to a trained model."""

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache_builder.formats import Codebook, TokenCache
from cache_builder.formats.views import centre_square
from cache_builder.imaging import apply_view, decode
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.tokenizers.plugins import adopt
from tests import factories, plugins
from tests.documents.blocks import texts_of
from tests.tokenizers_svc.sending import read_ids
from tests.tokenizers_svc.support import check_problem, serving
from tokenizers_svc.app import create_app

SIZE, VOCAB = 64, 64
TINY = [
    "--set", "run.steps=2", "--set", "data.batch_size=8", "--set", "data.num_workers=0",
    "--set", "model.embed_dim=32",
    "--set", "model.num_heads=2", "--set", "model.depth=2", "--set", "optim.warmup_steps=1",
    "--set", "run.checkpoint_every=2", "--set", "run.device=cpu", "--set", "run.precision=fp32",
]  # fmt: skip


def squares(paths, size):
    """Return the centred squares of images, (n, 3, S, S) uint8."""
    pictures = [decode(path.read_bytes()) for path in paths]
    views = [centre_square(tuple(pixels.shape[-2:])) for pixels in pictures]
    return torch.stack([
        apply_view(pixels, view, size) for pixels, view in zip(pictures, views, strict=True)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The example plugin, installed."""
    site = plugins.install(plugins.VQ, tmp_path_factory.mktemp("vq"))
    with plugins.on_path(site):
        yield site


@pytest.fixture(scope="module")
def folder(site, tmp_path_factory):
    """Images, and a VQ autoencoder that has seen them for some steps."""
    from patchcache_vq import VQAutoencoder

    root = tmp_path_factory.mktemp("route")
    images = factories.write_folder(root / "images", factories.photo_images(24, height=80))
    torch.manual_seed(0)  # some draws of its weights put centroids where rounding decides
    model = VQAutoencoder(SIZE, VOCAB)
    model.fit(squares(sorted(images.rglob("*.jpg")), SIZE), steps=8)
    model.save(root / "vq.safetensors")
    return root


@pytest.fixture(scope="module")
def codebook(folder):
    """The file that `patchcache adopt` writes."""
    path = folder / "codebook.safetensors"
    adopt("vq", str(folder / "vq.safetensors"), {}).save(path)
    return path


@pytest.fixture(scope="module")
def cache(folder, codebook):
    """A cache of two views of every image."""
    factories.build_cache(
        images=str(folder / "images"), codebook=codebook, out=folder / "cache", num_views=2
    )
    return folder / "cache"


def test_the_centroids_are_those_of_the_library(codebook):
    from patchcache_vq import load

    model = load(codebook.parent / "vq.safetensors")
    np.testing.assert_array_equal(
        Codebook.load(codebook).centroids[0], model.quantizer.codebook.numpy()
    )


def test_the_built_cache_is_verified_and_inspected(patchcache, folder, cache, codebook):
    done = patchcache("verify", cache, "--retokenize", 5, "--workers", 0, "--device", "cpu")
    assert (done.status, done.err) == (0, ""), done.out
    with TokenCache.open(cache) as opened:
        assert opened.manifest.fingerprint == Codebook.load(codebook).fingerprint
        ids = np.stack([opened[index].token_ids for index in range(len(opened))])
    assert ids.shape == (24, 2, 4, 4)
    assert len(np.unique(ids)) > 1
    page = folder / "cache.html"
    assert patchcache("inspect", cache, "--page", page).status == 0
    assert "plugin:vq" in page.read_text()
    assert "patchcache-vq" in patchcache("inspect", codebook).out


def test_a_changed_id_is_found_and_one_that_rounding_may_turn_is_not(cache, codebook):
    from cache_builder.payload_checks import num_near_ties

    tokenizer = PatchTokenizer.load(codebook)
    with TokenCache.open(cache) as opened:
        views = factories.views_of(opened[0], tokenizer.pixel_rule)
    features = tokenizer.features(views).flatten(0, 1)
    ids = tokenizer.encode(views).flatten()
    centroids = tokenizer.codebook.centroids[0]
    assert num_near_ties(centroids, features, ids, ids) == len(ids)
    assert num_near_ties(centroids, features, (ids + 1) % VOCAB, ids) < len(ids) / 2


def test_an_appraisal_measures_what_a_plugin_shows(patchcache, folder, codebook):
    page = folder / "codebook.html"
    words = ("--images", folder / "images", "--page", page, "--json", "--device", "cpu")
    done = patchcache("inspect", codebook, *words)
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["objective"] is None
    assert 0 < found["psnr_db"] < 60
    assert 1 < found["stages"][0]["num_used"] <= VOCAB
    assert "What the ids stand for" in page.read_text()


@pytest.fixture(scope="module")
def client(codebook):
    with serving(create_app(codebook, device="cpu")) as client:
        yield client


def test_the_service_says_what_the_cache_holds(client, cache):
    with TokenCache.open(cache) as opened:
        sample = opened[3]
    answer = client.post("/v1/tokenize", content=sample.image)
    np.testing.assert_array_equal(read_ids(answer), sample.token_ids[0])


def test_the_service_decodes_ids_and_says_what_is_left(client, cache, codebook):
    tokenizer = PatchTokenizer.load(codebook)
    with TokenCache.open(cache) as opened:
        sample = opened[0]
    view = factories.views_of(sample, tokenizer.pixel_rule)[:1]
    expected = tokenizer.decode(tokenizer.encode(view))[0].permute(1, 2, 0).numpy()
    assert len(np.unique(expected)) > 4
    body = {"token_ids": sample.token_ids[0].tolist()}
    for answer in (
        client.post("/v1/detokenize", json=body),
        client.post("/v1/reconstruct", content=sample.image),
    ):
        assert answer.status_code == 200, answer.text
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), expected)
    assert 0 < float(answer.headers["x-psnr"]) < 60


def test_the_service_refuses_what_a_plugin_has_not(client):
    image = factories.encode(factories.draw_photo(0))
    problem = check_problem(client.get("/v1/models/codebook/codebook.png"), 422, "not-decodable")
    assert "Centroids of plugin:vq with metric l2 are not pixels" in problem["detail"]
    answer = client.post("/v1/tokenize?soft_top_k=4", content=image)
    problem = check_problem(answer, 422, "no-soft-targets")
    assert "plugin:vq quantises by itself" in problem["detail"]


@pytest.mark.parametrize("method", ["beit", "dtm"])
def test_a_model_learns_from_the_ids_and_from_their_centroids(patchcache, cache, tmp_path, method):
    words = ["train", method, "--cache", cache, "--out", tmp_path, *TINY]
    done = patchcache(*words)
    assert done.status == 0, done.err
    assert list(tmp_path.rglob("*.pt"))


@pytest.mark.ray
@pytest.mark.slow
def test_workers_on_ray_find_the_plugin(site, folder, codebook, cache):
    paths = os.pathsep.join([str(site), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "cache_builder", "build", "--images", "images", "--views", "2",
         "--codebook", codebook, "--out", "ray-cache", "--workers", "1", "--device", "cpu"],
        cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
        check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shards = {path.name: path.read_bytes() for path in (folder / "ray-cache").glob("shards/*")}
    assert shards == {path.name: path.read_bytes() for path in cache.glob("shards/*")}


@pytest.mark.hosts
def test_a_vq_autoencoder_of_photographs_draws_them_again(patchcache, site, photos, tmp_path):
    from patchcache_vq import VQAutoencoder

    paths = sorted(photos.glob("*.JPEG"))
    seen, unseen = tmp_path / "seen", tmp_path / "unseen"
    for place, some in ((seen, paths[:200]), (unseen, paths[200:])):
        place.mkdir()
        for path in some:
            (place / path.name).symlink_to(path)
    model = VQAutoencoder(SIZE, 256)
    model.fit(squares(paths[:200], SIZE), steps=250)
    model.save(tmp_path / "vq.safetensors")
    codebook = tmp_path / "codebook.safetensors"
    arguments = ("--arg", "vocab_size=256", "--weights", tmp_path / "vq.safetensors")
    assert patchcache("adopt", "vq", *arguments, "--out", codebook).status == 0
    found = patchcache("inspect", codebook, "--images", unseen, "--json", "--device", "cpu")
    measured = json.loads(found.out)
    grey = squares(paths[200:], SIZE).double()
    flat = 10 * np.log10(255**2 / float((grey - grey.mean((2, 3), keepdim=True)).square().mean()))
    assert measured["psnr_db"] > flat + 0.5  # better than every picture's own mean colour
    assert measured["stages"][0]["perplexity"] > 20


def test_the_page_on_tokenizers_is_a_complete_plugin(patchcache, tmp_path, monkeypatch):
    page = Path(__file__).parent.parent / "docs" / "tokenizers.md"
    project = tmp_path / "project"
    project.mkdir()
    for language, name in (("python", "brightness.py"), ("toml", "pyproject.toml")):
        (block,) = texts_of(page, language)
        (project / name).write_text(block)
    (commands,) = texts_of(page, "sh")
    factories.write_folder(tmp_path / "photos", factories.photo_images(12))
    monkeypatch.chdir(tmp_path)
    further = {"build": ["--workers", "0"], "verify": ["--workers", "0"], "train": TINY}
    with plugins.on_path(plugins.install(project, tmp_path)):
        for line in commands.splitlines():
            _, name, *words = shlex.split(line)
            done = patchcache(name, *words, *further.get(name, []))
            assert done.status == 0, (line, done.err)
            if name == "adopt":
                assert "plugin:brightness of brightness-tokenizer 1.0\n" in done.out
                assert "token ids    16 for each of 4 x 4 patches of 64 pixels\n" in done.out
                assert "centroids    none\npictures     decoded from ids\n" in done.out
    codebook = Codebook.load("brightness.safetensors")
    assert (codebook.vocab_size, codebook.plugin.distribution) == (16, "brightness-tokenizer")
