"""What is left of a picture after its patches have become ids."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from cache_builder.formats.views import View
from tests.tokenizers_svc.sending import BODIES, send
from tests.tokenizers_svc.support import (
    check_problem,
    encode_image,
    jpeg,
    make_codebook,
    make_tokenizer,
    resized_view,
)

PATH = "/v1/reconstruct"


def expected(body, view=None):
    """The pixels that are left, (S, S, 3), and their PSNR, dB."""
    tokenizer = make_tokenizer()
    seen = resized_view(body, view)
    left = tokenizer.decode(tokenizer.encode(seen[None]))[0]
    error = float((seen.double() - left.double()).square().mean())
    return left.permute(1, 2, 0).numpy(), 10 * math.log10(255**2 / error)


@pytest.mark.parametrize("kind", BODIES)
def test_a_picture_in_every_body_leaves_what_the_library_says(zoo, kind):
    body, view = jpeg(seed=41), (3, 4, 50, 40, True)
    answer = send(zoo, kind, body, view, path=PATH)
    pixels, psnr = expected(body, View(*view))
    assert answer.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), pixels)
    assert float(answer.headers["x-psnr"]) == pytest.approx(psnr, abs=1e-3)


@pytest.mark.parametrize("form", ["webp", "npy"])
def test_what_is_left_comes_in_every_form(zoo, form):
    body = jpeg(seed=42)
    answer = send(zoo, "raw", body, path=PATH, params={"format": form})
    content = io.BytesIO(answer.content)
    pixels = np.load(content) if form == "npy" else np.asarray(Image.open(content))
    np.testing.assert_array_equal(pixels, expected(body)[0])


def test_a_picture_of_centroids_loses_nothing(zoo):
    patches = torch.from_numpy(make_codebook().centroids[0])
    body = encode_image(
        Image.fromarray(
            patches.view(4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2).reshape(32, 32, 3).numpy()
        ),
        "PNG",
    )
    answer = send(zoo, "raw", body, path=PATH, params={"format": "npy"})
    assert answer.headers["x-psnr"] == "inf"
    seen = resized_view(body).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), seen)


def test_centroids_that_are_no_pixels_leave_no_picture(zoo):
    answer = send(zoo, "raw", jpeg(), path=PATH, params={"model": "cosine"})
    check_problem(answer, 422, "not-decodable")


def test_a_bad_picture_is_refused_as_everywhere(zoo):
    check_problem(send(zoo, "raw", b"x", path=PATH), 415, "not-an-image")
    check_problem(send(zoo, "raw", b"", path=PATH), 400, "empty-body")
    refused = send(zoo, "raw", jpeg(), path=PATH, params={"soft_top_k": 2})
    check_problem(refused, 400, "bad-request")
