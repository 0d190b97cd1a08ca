"""Codebooks as files: whole, in parts, and not at all where the client has them."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from cache_builder.formats.codebook import Codebook
from tests.tokenizers_svc.support import check_problem, make_codebook, make_zoo

KINDS = {
    "npy": "application/x-npy", "png": "image/png", "safetensors": "application/octet-stream",
}  # fmt: skip


def path_of(kind, model="plain"):
    return f"/v1/models/{model}/codebook.{kind}"


@pytest.mark.parametrize("model", ["plain", "residual", "cosine"])
def test_npy_and_safetensors_are_the_codebook(zoo, model):
    codebook = make_codebook() if model == "plain" else make_zoo()[model].codebook
    centroids = np.load(io.BytesIO(zoo.get(path_of("npy", model)).content))
    assert centroids.dtype == codebook.centroids.dtype
    np.testing.assert_array_equal(centroids, codebook.centroids)
    read = Codebook.from_bytes(zoo.get(path_of("safetensors", model)).content, "the answer")
    assert read.fingerprint == codebook.fingerprint


@pytest.mark.parametrize("model", ["plain", "residual"])
def test_png_shows_the_centroids_row_by_row(zoo, model):
    answer = zoo.get(path_of("png", model))
    atlas = np.asarray(Image.open(io.BytesIO(answer.content)))
    codebook = make_codebook() if model == "plain" else make_zoo()[model].codebook
    across = math.ceil(math.sqrt(16))
    assert atlas.shape == (across * 8, across * 8, 3)
    for number, centroid in enumerate(codebook.centroids[0]):
        top, left = 8 * (number // across), 8 * (number % across)
        patch = centroid.reshape(3, 8, 8).transpose(1, 2, 0)
        np.testing.assert_array_equal(atlas[top : top + 8, left : left + 8], patch)


def test_centroids_that_are_no_pixels_have_no_picture(zoo):
    check_problem(zoo.get(path_of("png", "cosine")), 422, "not-decodable")


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_has_a_file_is_told_so(zoo, kind):
    whole = zoo.get(path_of(kind))
    etag = whole.headers["etag"]
    assert whole.headers["content-type"] == KINDS[kind]
    assert etag.startswith('"')
    for known in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        answer = zoo.get(path_of(kind), headers={"If-None-Match": known})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
    answer = zoo.get(path_of(kind), headers={"If-None-Match": '"other"'})
    assert answer.content == whole.content


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=100-140", slice(100, 141)),
        ("bytes=3000-", slice(3000, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=0-99999999", slice(None)),
        ("bytes=-99999999", slice(None)),
        ("Bytes = 5-6", None),
        ("bytes=6-5", None),
        ("bytes=0-1,5-6", None),
        ("bytes=-", None),
        ("lines=1-2", None),
        ("nonsense", None),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_a_part_is_a_part_and_what_is_no_range_gets_everything(zoo, kind, asked, part):
    whole = zoo.get(path_of(kind)).content
    answer = zoo.get(path_of(kind), headers={"Range": asked})
    if part is None:
        assert (answer.status_code, answer.content) == (200, whole)
        return
    start, stop, _ = part.indices(len(whole))
    assert (answer.status_code, answer.content) == (206, whole[part])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
    assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0"])
def test_a_part_behind_the_end_is_refused_with_the_length(zoo, asked):
    length = len(zoo.get(path_of("npy")).content)
    answer = zoo.get(path_of("npy"), headers={"Range": asked})
    check_problem(answer, 416, "range-not-satisfiable")
    assert answer.headers["content-range"] == f"bytes */{length}"


def test_a_part_of_another_content_than_the_client_has_is_the_whole(zoo):
    whole = zoo.get(path_of("npy"))
    for etag, status in ((whole.headers["etag"], 206), ('"other"', 200)):
        headers = {"Range": "bytes=0-9", "If-Range": etag}
        assert zoo.get(path_of("npy"), headers=headers).status_code == status


def test_a_file_named_by_its_digest_may_be_kept_for_ever(zoo):
    digest = zoo.get("/v1/models/plain").json()["digest"]
    named = zoo.get(path_of("npy"), params={"digest": digest})
    assert named.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert zoo.get(path_of("npy")).headers["cache-control"] == "no-cache"
    wrong = zoo.get(path_of("npy"), params={"digest": "0" * 64})
    check_problem(wrong, 404, "not-found")
    check_problem(zoo.get(path_of("npy"), params={"sha": digest}), 400, "bad-request")
