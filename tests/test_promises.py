"""The promises that cross packages: one rule for tokens, and the whole route on real images."""

import tarfile

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from cache_builder import build, fit, verify
from cache_builder.formats import Codebook, TokenCache, View
from cache_builder.imaging import apply_view, decode
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.tokenizers import PatchTokenizer
from cache_builder.tokenizers.features import FeatureOptions
from tests import factories
from tests.tokenizers_svc.support import wait_ready
from tokenizers_svc.app import create_app
from trainer import evaluate, train
from trainer.config import load_config

LAYOUTS = ["webdataset", "zarr"]
HERE = ClusterOptions(num_workers=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fitted_to_k_colours_the_route_gives_exactly_the_colours_back(tmp_path, layout):
    # Views of whole pictures, some mirrored: each patch is one plain colour.
    drawn = factories.write_folder(tmp_path / "images", factories.patch_images(30))
    codebook_path = tmp_path / "codebook.safetensors"
    features = FeatureOptions("pixel", factories.SIZE, factories.PATCH)
    fit.run(fit.FitOptions(str(drawn), codebook_path, 6, features, device="cpu", cluster=HERE))
    colours = Codebook.load(codebook_path).centroids[0].reshape(6, 3, -1)
    assert (colours == colours[:, :, :1]).all()
    build.run(
        build.BuildOptions(
            str(drawn), codebook_path, tmp_path / "cache", num_views=5, scale=(1.0, 1.0),
            ratio=(1.0, 1.0), layout=layout, device="cpu", unit_size=10, cluster=HERE,
        )
    )  # fmt: skip
    num_mirrored = 0
    with TokenCache.open(tmp_path / "cache") as cache:
        for sample in (cache[index] for index in range(len(cache))):
            ids = factories.random_ids(int(sample.key[-3:]))
            for view, token_ids in zip(sample.views, sample.token_ids, strict=True):
                expected = factories.COLOURS[ids[:, ::-1] if view[4] else ids]
                assert np.array_equal(colours[token_ids][..., 0], expected)
                num_mirrored += int(view[4])
    assert num_mirrored > 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache_service_and_library_give_the_same_tokens_for_the_same_view(
    tmp_path, codebook_path, layout
):
    images = factories.write_folder(tmp_path / "images", factories.photo_images(6))
    factories.build_cache(
        images=str(images), codebook=codebook_path, out=tmp_path / "cache", num_views=4,
        layout=layout,
    )  # fmt: skip
    tokenizer = PatchTokenizer.load(codebook_path)
    with TokenCache.open(tmp_path / "cache") as cache, TestClient(create_app(tokenizer)) as client:
        wait_ready(client)
        for sample in (cache[index] for index in range(len(cache))):
            picture = decode(sample.image)
            for box, cached in zip(sample.views.tolist(), sample.token_ids, strict=True):
                pixels = apply_view(picture, View(*box), factories.SIZE)[None]
                assert np.array_equal(tokenizer.encode(pixels)[0].numpy(), cached)
                view = ",".join(map(str, box))
                answer = client.post(f"/v1/tokenize?view={view}", content=sample.image).json()
                assert answer["token_ids"] == cached.ravel().tolist()
                assert answer["fingerprint"] == cache.manifest.fingerprint


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_route_runs_on_real_photographs(tmp_path, photos):
    codebook = tmp_path / "codebook.safetensors"
    fit.run(fit.FitOptions(str(photos), codebook, 512, FeatureOptions("pixel"), iterations=4))
    summary = build.run(build.BuildOptions(str(photos), codebook, tmp_path / "cache", num_views=4))
    assert summary.manifest.num_samples == 250
    assert summary.manifest.grid == (14, 14)
    report = verify.run(tmp_path / "cache", retokenize=20)
    assert report.problems == []
    (again,) = report.retokenized.values()
    assert again.num_tokens == 20 * 4 * 196


@pytest.mark.slow
def test_the_route_runs_on_cifar_with_patches_of_four_pixels(tmp_path, cifar_tar):
    folder = tmp_path / "cifar"
    with tarfile.open(cifar_tar) as tar:
        for index, member in enumerate(m for m in tar if m.name.startswith("cifar10/test/")):
            if member.isfile() and index % 12 == 0:
                path = folder / member.name.removeprefix("cifar10/test/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    codebook = tmp_path / "codebook.safetensors"
    features = FeatureOptions("pixel", image_size=32, patch_size=4)
    fit.run(fit.FitOptions(str(folder), codebook, 64, features, iterations=4, cluster=HERE))
    options = build.BuildOptions(
        str(folder), codebook, tmp_path / "cache", num_views=2, layout="zarr", cluster=HERE
    )
    summary = build.run(options)
    assert summary.manifest.grid == (8, 8)
    assert len(summary.manifest.spec.class_names) == 10
    assert verify.run(tmp_path / "cache", retokenize=50).problems == []
    settings = ["run.steps=6", "data.batch_size=32", "optim.warmup_steps=1"]
    torch.manual_seed(0)
    trained = train.run(load_config("beit_drop", settings), tmp_path / "cache", tmp_path / "run")
    result = evaluate.probe(trained.checkpoint)
    assert result.num_classes == 10
    assert result.num_train + result.num_test == summary.manifest.num_samples
