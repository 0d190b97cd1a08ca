"""A model is loaded again beside the old one, which serves until the new one does."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from cache_builder.tokenizers import PatchTokenizer
from tests.tokenizers_svc.support import (
    WatchedTokenizer,
    check_problem,
    expected_ids,
    jpeg,
    make_codebook,
    make_tokenizer,
    post,
    serving,
    wait_until,
)
from tokenizers_svc.app import create_app
from tokenizers_svc.limits import Limits
from tokenizers_svc.options import ServiceOptions

KEY = "an-admin-key-of-the-tests"
ADMIN = {"Authorization": f"Bearer {KEY}"}
OTHER = make_codebook(seed=9)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "plain.safetensors"
    make_codebook().save(path)
    return path


@pytest.fixture
def options(tmp_path):
    keys = tmp_path / "admin-keys"
    keys.write_text(KEY)
    return ServiceOptions(access={"admin_key_file": keys}, limits=Limits(kept_bytes=1_000_000))


@contextlib.contextmanager
def reloadable(codebooks, options):
    app = create_app(codebooks, options=options, device="cpu")
    with serving(app) as client:
        client.service = app.state.service
        yield client


def reload(client, name="plain"):
    return client.post(f"/v1/admin/models/{name}:reload", headers=ADMIN)


def test_a_reload_serves_the_new_codebook_and_ends_the_old_one(path, options):
    body = jpeg()
    with reloadable(path, options) as client:
        assert post(client, body).json()["token_ids"] == expected_ids(body)
        old = client.service.registry.default
        OTHER.save(path)
        answer = reload(client)
        assert answer.status_code == 200, answer.text
        assert answer.json()["fingerprint"] == OTHER.fingerprint
        assert answer.json()["previous_fingerprint"] == make_codebook().fingerprint
        assert answer.headers["x-tokenizer-fingerprint"] == OTHER.fingerprint
        served = post(client, body)  # and not what was kept of the old one
        assert served.json()["token_ids"] == expected_ids(
            body, tokenizer=PatchTokenizer.load(OTHER)
        )
        assert served.headers["x-tokenizer-fingerprint"] == OTHER.fingerprint
        assert client.get("/healthz").headers["x-tokenizer-fingerprint"] == OTHER.fingerprint
        assert client.get("/v1/models/plain").json()["digest"] == OTHER.header.digest
        wait_until(lambda: not old.batcher.is_alive)


def test_a_codebook_that_cannot_be_read_leaves_the_old_one_serving(path, options):
    body = jpeg()
    with reloadable(path, options) as client:
        path.write_bytes(b"damaged")
        problem = check_problem(reload(client), 422, "reload-failed")
        assert "cannot be read as a codebook" in problem["detail"]
        path.unlink()
        assert "no codebook" in check_problem(reload(client), 422, "reload-failed")["detail"]
        assert post(client, body).json()["token_ids"] == expected_ids(body)
        assert client.get("/readyz").status_code == 200


def test_a_tokenizer_that_cannot_be_loaded_leaves_the_old_one_serving(path, options):
    from cache_builder.formats.codebook import Codebook
    from cache_builder.formats.codebook_header import ExtractorSpec

    strange = Codebook(
        OTHER.centroids, OTHER.counts, metric="l2", pixel_rule=OTHER.pixel_rule,
        extractor=ExtractorSpec(id="nonsense:model"),
    )  # fmt: skip
    body = jpeg()
    with reloadable(path, options) as client:
        strange.save(path)
        problem = check_problem(reload(client), 422, "reload-failed")
        assert "Unknown features" in problem["detail"]
        assert post(client, body).json()["token_ids"] == expected_ids(body)
        assert client.get("/readyz").status_code == 200


def test_what_the_old_model_has_begun_it_ends(path, options):
    slow = WatchedTokenizer()
    with reloadable(path, options) as client, ThreadPoolExecutor(1) as pool:
        registry = client.service.registry
        source = registry.default.source._replace(load=lambda: slow)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "open", lambda _path: source)
            assert reload(client).status_code == 200
        old = registry.default
        num_warm_up = len(slow.batch_sizes)
        slow.may_run.clear()
        waiting = pool.submit(post, client, jpeg(seed=1))
        wait_until(lambda: len(slow.batch_sizes) > num_warm_up)
        OTHER.save(path)
        assert reload(client).json()["fingerprint"] == OTHER.fingerprint
        assert old.batcher.is_alive
        slow.may_run.set()
        answer = waiting.result()
        assert answer.json()["fingerprint"] == make_codebook().fingerprint
        assert answer.json()["token_ids"] == expected_ids(jpeg(seed=1))
        wait_until(lambda: not old.batcher.is_alive)


def test_only_an_administrator_reloads(path, options):
    with reloadable({"plain": path, "given": make_tokenizer()}, options) as client:
        url = "/v1/admin/models/plain:reload"
        check_problem(client.post(url), 401, "unauthorized")
        check_problem(reload(client, "none"), 404, "model-not-found")
        given = check_problem(reload(client, "given"), 422, "reload-failed")
        assert "not loaded from a file" in given["detail"]
        client.service.is_draining = True
        check_problem(reload(client), 503, "draining")


def test_without_an_admin_key_nobody_reloads(client):
    answer = client.post("/v1/admin/models/tiny-k16:reload", headers=ADMIN)
    check_problem(answer, 403, "forbidden")
