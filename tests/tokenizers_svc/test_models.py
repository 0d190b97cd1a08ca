"""Several models in one process: which one answers, and what is said of them."""

import numpy as np
import pytest

from cache_builder.errors import ArtifactError, ConfigError
from cache_builder.formats.codebook import Codebook
from cache_builder.tokenizers.features import FeatureOptions, make_extractor
from tests.tokenizers_svc.sending import send, send_batch
from tests.tokenizers_svc.support import (
    check_problem,
    expected_ids,
    jpeg,
    make_codebook,
    make_tokenizer,
    make_zoo,
    post,
    serving,
)
from tokenizers_svc.app import create_app
from tokenizers_svc.options import ServiceOptions, name_codebooks


def test_the_query_names_the_model_and_without_it_the_first_one_answers(zoo):
    body = jpeg(seed=51)
    for name, tokenizer in {"plain": make_tokenizer(), **make_zoo()}.items():
        answer = post(zoo, body, params={"model": name})
        assert answer.json()["model"] == name
        assert answer.json()["token_ids"] == expected_ids(body, tokenizer=tokenizer)
        assert answer.json()["fingerprint"] == tokenizer.fingerprint
        assert answer.headers["x-tokenizer-fingerprint"] == tokenizer.fingerprint
    assert post(zoo, body).json()["model"] == "plain"


def test_refusals_carry_the_fingerprint_of_the_model_too(zoo):
    answer = post(zoo, b"x", params={"model": "cosine"})
    assert answer.headers["x-tokenizer-fingerprint"] == make_zoo()["cosine"].fingerprint
    answer = zoo.get("/healthz")
    assert answer.headers["x-tokenizer-fingerprint"] == make_tokenizer().fingerprint


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/tokenize?model=none"),
        ("POST", "/v1/tokenize/batch?model=none"),
        ("POST", "/v1/detokenize?model=none"),
        ("POST", "/v1/reconstruct?model=none"),
        ("GET", "/v1/tokens/" + "0" * 64 + "?model=none"),
        ("GET", "/v1/models/none"),
        ("GET", "/v1/models/none/codebook.npy"),
    ],
)
def test_a_model_that_is_not_there_is_told_where_the_others_are(zoo, method, path):
    problem = check_problem(zoo.request(method, path), 404, "model-not-found")
    assert "/v1/models" in problem["detail"]


def test_the_list_says_of_every_model_what_may_be_asked_of_it(zoo):
    models = {model["id"]: model for model in zoo.get("/v1/models").json()["models"]}
    assert list(models) == ["plain", "residual", "cosine"]
    assert [model["num_stages"] for model in models.values()] == [1, 2, 1]
    assert [model["dtype"] for model in models.values()] == ["uint8", "int16", "float32"]
    assert [model["decodes_to_pixels"] for model in models.values()] == [True, True, False]
    assert models["residual"] == zoo.get("/v1/models/residual").json()
    assert models["plain"]["digest"] == make_codebook().header.digest


def test_codebooks_of_one_feature_model_share_it(tmp_path):
    import torch

    options = FeatureOptions("timm:vit_tiny_patch16_224", image_size=32, random_weights_seed=0)
    extractor = make_extractor(options, torch.device("cpu"))
    rng = np.random.default_rng(0)
    paths = {}
    for name in ("a", "b"):
        codebook = Codebook(
            rng.normal(size=(1, 8, 192)).astype(np.float32), np.ones((1, 8), np.int64),
            metric="l2", pixel_rule=extractor.pixel_rule, extractor=extractor.spec,
        )  # fmt: skip
        paths[name] = tmp_path / f"{name}.safetensors"
        codebook.save(paths[name])
    app = create_app(paths, device="cpu")
    with serving(app) as client:
        registry = app.state.service.registry
        a, b = (registry.get(name).source.load() for name in paths)
        assert a.extractor is b.extractor
        answers = [post(client, jpeg(), params={"model": name}).json() for name in paths]
    assert answers[0]["fingerprint"] != answers[1]["fingerprint"]
    assert answers[0]["token_ids"] != answers[1]["token_ids"]


def test_options_name_the_codebooks_and_arguments_go_before_them(codebook_path):
    options = ServiceOptions(codebooks={"x": str(codebook_path)}, device="nonsense", docs=False)
    with pytest.raises(ConfigError, match="nonsense"):
        create_app(options=options)
    with serving(create_app(options=options, device="cpu")) as client:
        assert send(client, "raw", jpeg()).json()["model"] == "x"
        assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def test_a_service_without_a_codebook_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs a codebook"):
        create_app()
    with pytest.raises(ConfigError, match="cannot be the name of a model"):
        create_app({"a/b": make_tokenizer()})
    with pytest.raises(ConfigError, match="bring their names themselves"):
        create_app({"a": make_tokenizer()}, model="b")
    with pytest.raises(ArtifactError, match="There is no codebook"):
        create_app({"a": make_tokenizer(), "b": tmp_path / "none.safetensors"}, device="cpu")


def test_codebooks_are_called_by_their_files_or_as_they_are_told(tmp_path):
    odd = tmp_path / "k=16.safetensors"
    odd.touch()
    given = ["a/b.safetensors", "name=c/d.safetensors", "s3://x/y=1/e.safetensors", odd]
    assert name_codebooks(given) == {
        "b": "a/b.safetensors",
        "name": "c/d.safetensors",
        "e": "s3://x/y=1/e.safetensors",
        "k=16": str(odd),
    }
    with pytest.raises(ConfigError, match="Two codebooks are called 'b'"):
        name_codebooks(["x/b.safetensors", "y/b.safetensors"])
    with pytest.raises(ConfigError, match="cannot be the name"):
        name_codebooks(["=a.safetensors"])


def test_a_batch_is_that_of_the_model_it_names(zoo):
    answer = send_batch(zoo, "json", [jpeg()], params={"model": "cosine"}).json()
    assert answer["items"][0]["token_ids"] == expected_ids(jpeg(), tokenizer=make_zoo()["cosine"])


def test_the_version_is_told(zoo):
    from importlib.metadata import version

    assert zoo.get("/version").json()["patchcache"] == version("patchcache")


def test_a_list_takes_no_query(zoo):
    check_problem(zoo.get("/v1/models?limit=1"), 400, "bad-request")
    check_problem(zoo.get("/v1/models/plain?limit=1"), 400, "bad-request")
