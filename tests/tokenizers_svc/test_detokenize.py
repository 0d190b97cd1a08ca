"""Token ids become the picture that the library makes of them; others are refused by pointer."""

import io
import json

import msgpack
import numpy as np
import pytest
import torch
from PIL import Image

from tests.tokenizers_svc.support import check_problem, make_tokenizer, make_zoo

RNG = np.random.default_rng(5)
ONE = RNG.integers(0, 16, (4, 4))
SEVERAL = RNG.integers(0, 16, (3, 4, 4))
FAR = 10**18 - 1
JSON = {"Content-Type": "application/json"}


def decoded(ids, tokenizer=None):
    """(B, S, S, 3) of ids (B, rows, cols[, M])."""
    pixels = (tokenizer or make_tokenizer()).decode(torch.from_numpy(np.asarray(ids)))
    return pixels.permute(0, 2, 3, 1).numpy()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def forms_of(ids):
    """Bodies that hold the same ids; the first ones say what they are."""
    packed = {"Content-Type": "application/msgpack"}
    flat = ids.astype("<u2").tobytes()
    return [
        (JSON, json.dumps({"token_ids": ids.tolist()})),
        (packed, msgpack.packb({"token_ids": ids.tolist()})),
        (packed, msgpack.packb({"token_ids": flat})),
        ({"Content-Type": "application/x-npy"}, npy(ids)),
        ({"Content-Type": "application/x-npy"}, npy(np.asfortranarray(ids.astype(">i4")))),
        ({"Content-Type": "application/octet-stream"}, npy(ids.astype(np.uint16))),
        ({"Content-Type": "application/octet-stream"}, flat),
    ]


@pytest.mark.parametrize("form", range(7))
def test_ids_in_every_form_are_the_picture_that_the_library_makes(zoo, form):
    headers, content = forms_of(ONE)[form]
    answer = zoo.post("/v1/detokenize", content=content, headers=headers)
    assert answer.headers["content-type"] == "image/png"
    picture = np.asarray(Image.open(io.BytesIO(answer.content)))
    np.testing.assert_array_equal(picture, decoded(ONE[None])[0])


@pytest.mark.parametrize("form", range(7))
def test_several_grids_come_back_as_one_array(zoo, form):
    headers, content = forms_of(SEVERAL)[form]
    answer = zoo.post("/v1/detokenize", content=content, headers=headers)
    assert answer.headers["content-type"] == "application/x-npy"
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), decoded(SEVERAL))


def test_a_grid_may_be_flat_and_a_batch_of_flat_ones_too(zoo):
    for ids in (ONE.flatten(), SEVERAL.reshape(3, 16)):
        params = {"format": "npy"}
        answer = zoo.post("/v1/detokenize", json={"token_ids": ids.tolist()}, params=params)
        expected = decoded(ids.reshape(-1, 4, 4))
        pixels = np.load(io.BytesIO(answer.content))
        np.testing.assert_array_equal(pixels, expected[0] if ids.ndim == 1 else expected)


def test_webp_is_lossless(zoo):
    answer = zoo.post("/v1/detokenize", json={"token_ids": ONE.tolist()}, params={"format": "webp"})
    assert answer.headers["content-type"] == "image/webp"
    picture = np.asarray(Image.open(io.BytesIO(answer.content)))
    np.testing.assert_array_equal(picture, decoded(ONE[None])[0])


def test_all_stages_of_a_residual_codebook_are_added_up(zoo):
    ids = RNG.integers(0, 16, (4, 4, 2))
    params = {"model": "residual", "format": "npy"}
    answer = zoo.post("/v1/detokenize", json={"token_ids": ids.tolist()}, params=params)
    expected = decoded(ids[None], make_zoo()["residual"])[0]
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), expected)


def test_ids_of_the_service_go_in_as_they_came_out(zoo):
    from tests.tokenizers_svc.support import jpeg, post

    fields = post(zoo, jpeg()).json()
    answer = zoo.post("/v1/detokenize", json={"token_ids": fields["token_ids"]})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [((1, 2), 16, "16 is not in 0 to 15"), ((3, 0), -1, "-1 is not in 0 to 15")],
)
def test_an_id_that_the_model_has_not_is_pointed_at(zoo, place, value, message):
    ids = ONE.copy()
    ids[place] = value
    answer = zoo.post("/v1/detokenize", json={"token_ids": ids.tolist()})
    (error,) = check_problem(answer, 422, "invalid-tokens")["errors"]
    assert error == {"pointer": f"/token_ids/{place[0]}/{place[1]}", "message": message}


def test_of_many_wrong_ids_the_first_ten_are_pointed_at(zoo):
    answer = zoo.post("/v1/detokenize", json={"token_ids": [99] * 16})
    problem = check_problem(answer, 422, "invalid-tokens")
    assert len(problem["errors"]) == 10
    assert "16 of 16 are not" in problem["detail"]


@pytest.mark.parametrize(
    ("token_ids", "pointer"),
    [
        ([], "/token_ids"),
        ([0] * 15, "/token_ids"),
        ([[0] * 4] * 3, "/token_ids"),
        ([[[0] * 4] * 4] * 2 + [[[0] * 4] * 3], "/token_ids/2"),
        ([[0] * 4, [0] * 3, [0] * 4, [0] * 4], "/token_ids/1"),
        ([0] * 15 + ["a"], "/token_ids/15"),
        ([0] * 15 + [1.0], "/token_ids/15"),
        ([0] * 15 + [True], "/token_ids/15"),
        ([0] * 15 + [10**30], "/token_ids/15"),
        ([0] * 15 + [[0]], "/token_ids/15"),
        ([[[[[[0]]]]]], "/token_ids/0/0/0/0/0"),
        (None, "/token_ids"),
        ("0,1,2", "/token_ids"),
        ({"0": 1}, "/token_ids"),
    ],
)
def test_what_is_no_grid_of_ids_is_pointed_at(zoo, token_ids, pointer):
    answer = zoo.post("/v1/detokenize", json={"token_ids": token_ids})
    problem = check_problem(answer, 422, "invalid-tokens")
    assert problem["errors"][0]["pointer"] == pointer


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.float32), np.array(["a"]), np.zeros((2, 5), int)]
)
def test_an_npy_file_of_anything_else_is_refused(zoo, array):
    check_problem(zoo.post("/v1/detokenize", content=npy(array)), 422, "invalid-tokens")


@pytest.mark.parametrize(
    "content",
    [
        b"\x93NUMPY",
        npy(ONE)[:30],
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65_535,
        b"\x93NUMPY\x09\x00" + npy(ONE)[8:],
        npy(np.array([{"a": 1}], dtype=object)),
        npy(np.zeros((0, 4, 4), int)).replace(
            b"(0, 4, 4), }" + b" " * 34, b"(0, %d, %d), }" % (FAR, FAR)
        ),
    ],
    ids=["magic", "short", "deep header", "version", "objects", "endless sides of nothing"],
)
def test_a_damaged_npy_file_is_refused(zoo, content):
    answer = zoo.post("/v1/detokenize", content=content)
    assert answer.status_code in (400, 422)
    check_problem(answer, answer.status_code, answer.json()["code"])


def test_an_npy_file_that_promises_more_than_it_has_is_refused(zoo):
    promising = npy(ONE).replace(b"(4, 4), }" + b" " * 9, b"(4000000000, 4), }")
    assert b"(4000000000, 4)" in promising
    for content in (promising, npy(ONE)[:-8]):
        check_problem(zoo.post("/v1/detokenize", content=content), 422, "invalid-tokens")


@pytest.mark.parametrize("content", [b"", b"\0", b"\0" * 30, b"\0" * 33])
def test_bare_values_of_another_length_are_refused(zoo, content):
    answer = zoo.post("/v1/detokenize", content=content)
    check_problem(answer, *((422, "invalid-tokens") if content else (400, "empty-body")))


def test_more_grids_than_the_limit_are_refused(small):
    for ids in (np.zeros((4, 4, 4), int), np.zeros((400, 16), int)):
        answer = small.post("/v1/detokenize", json={"token_ids": ids.tolist()})
        assert check_problem(answer, 413, "batch-too-large")["limit"] == 3


@pytest.mark.parametrize("form", ["png", "webp"])
def test_several_grids_are_no_picture(zoo, form):
    answer = zoo.post(
        "/v1/detokenize", json={"token_ids": SEVERAL.tolist()}, params={"format": form}
    )
    assert "format=npy" in check_problem(answer, 406, "not-acceptable")["detail"]


@pytest.mark.parametrize("fields", [{}, {"tokens": [0]}, {"token_ids": [0], "more": 1}])
def test_other_fields_are_refused(zoo, fields):
    check_problem(zoo.post("/v1/detokenize", json=fields), 400, "bad-request")


def test_a_form_is_no_way_to_send_ids(zoo):
    answer = zoo.post("/v1/detokenize", files={"file": b"x"})
    check_problem(answer, 415, "unsupported-body")


def test_centroids_that_are_no_pixels_are_not_decoded(zoo):
    answer = zoo.post(
        "/v1/detokenize", json={"token_ids": ONE.tolist()}, params={"model": "cosine"}
    )
    check_problem(answer, 422, "not-decodable")


def test_another_format_is_refused(zoo):
    answer = zoo.post("/v1/detokenize", json={"token_ids": [0]}, params={"format": "gif"})
    assert "format" in check_problem(answer, 400, "bad-request")["detail"]
