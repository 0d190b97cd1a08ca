"""Folders in which the blocks of pages find what they name; a test works in each."""

import pytest

from tests import factories
from tests.places import ROOT
from tests.tokenizers_svc.support import jpeg, make_tokenizer, serving
from tokenizers_svc.app import create_app


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A folder with a codebook, and with caches of both layouts made by it."""
    root = tmp_path_factory.mktemp("caches")
    images = factories.write_folder(root / "photos", factories.photo_images(24))
    codebook = factories.write_codebook(root / "codebook.safetensors")
    for out, layout in (("cache", "webdataset"), ("cache.zarr", "zarr")):
        factories.build_cache(
            images=str(images), codebook=codebook, out=root / out, num_views=2, layout=layout,
            unit_size=10,
        )  # fmt: skip
    return root


@pytest.fixture
def among_caches(caches, monkeypatch):
    monkeypatch.chdir(caches)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def service_url():
    """Where a small service is."""
    with serving(create_app(make_tokenizer())) as client:
        yield str(client.base_url)


@pytest.fixture
def with_a_service(service_url, tmp_path, monkeypatch):
    """A service, and a folder of pictures for it; returns the URL by the name of the pages."""
    monkeypatch.chdir(tmp_path)
    names = ("photo.jpg", "a.jpg", "photos/0.jpg", "photos/1.jpg", "demo/photos/astronaut.png")
    factories.write_folder(tmp_path, {name: jpeg() for name in names})
    (tmp_path / "photos/2.jpg").write_bytes(b"text")
    return {"URL": service_url}
