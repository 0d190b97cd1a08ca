"""Whatever form an answer has, it holds the same ids."""

import msgpack
import numpy as np
import pytest
import torch

from cache_builder.soft_targets import soft_probabilities, soft_spec
from tests.tokenizers_svc.sending import BODIES, FORMS, read_ids, send
from tests.tokenizers_svc.support import (
    GRID,
    check_problem,
    expected_ids,
    jpeg,
    make_codebook,
    make_tokenizer,
    make_zoo,
    resized_view,
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BODIES)
def test_every_form_of_every_body_has_the_ids_of_the_library(zoo, kind, form):
    body = jpeg(seed=BODIES.index(kind))
    ids = read_ids(send(zoo, kind, body, headers={"Accept": FORMS[form]}))
    assert ids.dtype == np.uint16
    assert ids.shape == tuple(GRID)
    assert ids.flatten().tolist() == expected_ids(body)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_stages_of_a_residual_codebook(zoo, form):
    body = jpeg(seed=1)
    answer = send(zoo, "raw", body, params={"model": "residual"}, headers={"Accept": FORMS[form]})
    ids = read_ids(answer)
    assert ids.shape == (*GRID, 2)
    assert ids.flatten().tolist() == expected_ids(body, tokenizer=make_zoo()["residual"])


def test_msgpack_has_the_fields_of_json_and_ids_as_bytes(zoo):
    body = jpeg(seed=2)
    packed = send(zoo, "raw", body, headers={"Accept": FORMS["msgpack"]})
    plain = send(zoo, "raw", body).json()
    fields = msgpack.unpackb(packed.content)
    assert fields.pop("token_ids") == np.array(plain.pop("token_ids"), "<u2").tobytes()
    assert fields == plain


def test_bare_values_come_with_shape_and_type(zoo):
    answer = send(zoo, "raw", jpeg(seed=3), headers={"Accept": FORMS["raw"]})
    assert answer.headers["x-shape"] == "4,4"
    assert answer.headers["x-dtype"] == "<u2"
    assert len(answer.content) == 32


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("*/*", "json"),
        ("application/*", "json"),
        ("", "json"),
        ("text/html, application/xhtml+xml, */*;q=0.8", "json"),
        ("application/x-npy, application/json", "npy"),
        ("application/json;q=0.5, application/x-npy;q=0.9", "npy"),
        ("application/json;q=0, application/octet-stream", "raw"),
        ("APPLICATION/MSGPACK", "msgpack"),
        ("application/x-msgpack ; q=1.0", "msgpack"),
        ("application/vnd.msgpack;q=0.001", "msgpack"),
        ("application/x-npy;q=nonsense", "npy"),
    ],
)
def test_the_client_chooses_the_form_that_it_likes_best(zoo, accept, form):
    answer = send(zoo, "raw", jpeg(seed=4), headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == FORMS[form]
    assert answer.headers["vary"] == "Accept"


@pytest.mark.parametrize(
    "accept", ["text/html", "image/*", "application/json;q=0", ",", "nonsense"]
)
def test_a_client_that_accepts_nothing_that_there_is_is_told_what_there_is(zoo, accept):
    answer = send(zoo, "raw", jpeg(), headers={"Accept": accept})
    problem = check_problem(answer, 406, "not-acceptable")
    assert all(media_type in problem["detail"] for media_type in FORMS.values())


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_soft_targets_are_those_that_a_build_stores(zoo, temperature):
    body = jpeg(seed=6)
    params = {"soft_top_k": 3, "soft_temperature": temperature}
    answer = zoo.post(
        "/v1/tokenize",
        content=body,
        params={name: value for name, value in params.items() if value},
    ).json()
    tokenizer = make_tokenizer()
    spec = soft_spec(make_codebook(), 3, temperature)
    features = tokenizer.features(resized_view(body)[None])[0]
    distances = torch.cdist(
        features.double(), torch.from_numpy(make_codebook().centroids[0]).double()
    ).square()
    nearest = distances.sort(dim=1, stable=True)
    assert answer["soft"]["k"] == 3
    assert answer["soft"]["ids"] == nearest.indices[:, :3].flatten().tolist()
    exact = soft_probabilities(nearest.values[:, :3].round(), spec).numpy()
    assert answer["soft"]["probabilities"] == exact.astype(np.float16).flatten().tolist()
    assert answer["token_ids"] == answer["soft"]["ids"][::3] == expected_ids(body)


def test_soft_targets_in_msgpack_are_bytes(zoo):
    body, params = jpeg(seed=6), {"soft_top_k": 3}
    plain = send(zoo, "raw", body, params=params).json()["soft"]
    answer = send(zoo, "raw", body, params=params, headers={"Accept": FORMS["msgpack"]})
    soft = msgpack.unpackb(answer.content)["soft"]
    assert np.frombuffer(soft["ids"], "<u2").tolist() == plain["ids"]
    assert np.frombuffer(soft["probabilities"], "<f2").tolist() == plain["probabilities"]


@pytest.mark.parametrize("form", ["npy", "raw"])
def test_an_array_has_no_place_for_soft_targets(zoo, form):
    answer = send(zoo, "raw", jpeg(), params={"soft_top_k": 2}, headers={"Accept": FORMS[form]})
    check_problem(answer, 406, "not-acceptable")


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"soft_top_k": 1}, "must be 2 to 16"),
        ({"soft_top_k": 17}, "must be 2 to 16"),
        ({"soft_top_k": 65}, "at most 64"),
        ({"soft_temperature": 1}, "no meaning without soft_top_k"),
        ({"soft_top_k": 2, "soft_temperature": 0}, "must be positive"),
        ({"soft_top_k": 2, "soft_temperature": "inf"}, "must be positive"),
        ({"soft_top_k": 2, "model": "residual"}, "one stage"),
    ],
)
def test_soft_targets_that_a_model_has_not_are_refused(zoo, params, reason):
    answer = send(zoo, "raw", jpeg(), params=params)
    assert reason in check_problem(answer, 422, "no-soft-targets")["detail"]


@pytest.mark.parametrize(
    "params", [{"soft_top_k": "many"}, {"soft_top_k": 2, "soft_temperature": "x"}]
)
def test_a_number_that_is_none_is_refused_without_being_repeated(zoo, params):
    answer = send(zoo, "raw", jpeg(), params=params)
    problem = check_problem(answer, 400, "bad-request")
    assert "soft_" in problem["detail"]
    assert "many" not in answer.text
