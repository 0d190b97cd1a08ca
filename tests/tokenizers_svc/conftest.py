import pytest

from tests.tokenizers_svc.support import make_codebook, serving
from tokenizers_svc.app import create_app


@pytest.fixture(scope="session")
def codebook_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("codebook") / "tiny-k16.safetensors"
    make_codebook().save(path)
    return path


@pytest.fixture(scope="module")
def client(codebook_path):
    with serving(create_app(codebook_path, device="cpu")) as client:
        yield client
