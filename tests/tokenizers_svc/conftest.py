"""Services and codebooks that the tests of the service ask."""

import pytest

from tests.tokenizers_svc.support import make_codebook, make_tokenizer, make_zoo, serving
from tokenizers_svc.app import create_app
from tokenizers_svc.limits import Limits


@pytest.fixture(scope="session")
def codebook_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("codebook") / "tiny-k16.safetensors"
    make_codebook().save(path)
    return path


@pytest.fixture(scope="module")
def client(codebook_path):
    with serving(create_app(codebook_path, device="cpu")) as client:
        yield client


@pytest.fixture(scope="module")
def zoo(codebook_path):
    """A service of several models: `plain` is the default one."""
    with serving(create_app({"plain": codebook_path, **make_zoo()}, device="cpu")) as client:
        yield client


@pytest.fixture(scope="module")
def small():
    """A service with narrow limits; equal pictures are tokenised each."""
    limits = Limits(
        max_body_bytes=20_000, max_batch_body_bytes=60_000, max_items=3, max_pixels=10_000,
        max_batch_pixels=12_000, kept_bytes=0,
    )  # fmt: skip
    with serving(create_app(make_tokenizer(), limits=limits)) as client:
        yield client
