"""What the service answers is what the library says."""

import numpy as np
import pytest
from PIL import Image

from cache_builder.formats.views import View
from cache_builder.tokenizers import PatchTokenizer
from tests.tokenizers_svc.support import (
    GRID,
    draw,
    encode_image,
    expected_ids,
    jpeg,
    make_codebook,
    make_tokenizer,
    post,
    serving,
)
from tokenizers_svc.app import create_app


def deep_grey():
    values = np.asarray(draw(mode="L")).astype(np.uint16) * 257
    return Image.fromarray(values)


def with_alpha():
    image = draw(mode="RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def lying_on_its_side():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode_image(draw((90, 50)), exif=exif)


PICTURES = {
    "jpeg": jpeg(),
    "portrait jpeg": jpeg((50, 90)),
    "progressive jpeg": encode_image(draw(), progressive=True),
    "grey jpeg": encode_image(draw(mode="L")),
    "cmyk jpeg": encode_image(draw(mode="CMYK")),
    "exif-rotated jpeg": lying_on_its_side(),
    "png": encode_image(draw(), "PNG"),
    "16-bit png": encode_image(deep_grey(), "PNG"),
    "png with alpha": encode_image(with_alpha(), "PNG"),
    "palette gif": encode_image(draw(mode="P"), "GIF"),
    "webp": encode_image(draw(), "WEBP"),
    "bmp": encode_image(draw(), "BMP"),
    "tiff": encode_image(draw(), "TIFF"),
    "smaller than the view": jpeg((9, 7)),
    "one pixel": encode_image(Image.new("RGB", (1, 1), (10, 200, 90)), "PNG"),
    "very long": jpeg((900, 4)),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_of_picture_is_tokenised_as_the_library_does(client, kind):
    answer = post(client, PICTURES[kind])
    assert answer.status_code == 200, answer.text
    assert answer.json()["token_ids"] == expected_ids(PICTURES[kind])


def test_the_answer_names_the_model_the_tokenizer_the_shape_and_the_view(client):
    body = jpeg()
    assert post(client, body).json() == {
        "model": "tiny-k16",
        "fingerprint": make_codebook().fingerprint,
        "shape": GRID,
        "dtype": "uint16",
        "token_ids": expected_ids(body),
        "view": [0, 10, 60, 60, False],
        "image": {"width": 80, "height": 60, "format": "JPEG"},
    }


def test_a_named_view_is_the_one_that_is_tokenised(client):
    body = jpeg()
    answer = post(client, body, params={"view": "5,11,40,50"})
    assert answer.json()["token_ids"] == expected_ids(body, View(5, 11, 40, 50, hflip=False))
    assert answer.json()["token_ids"] != expected_ids(body)


@pytest.mark.parametrize(("hflip", "text"), [(True, "5,11,40,50,1"), (False, "5,11,40,50,0")])
def test_a_named_view_is_mirrored_only_if_it_says_so(client, hflip, text):
    body = jpeg()
    answer = post(client, body, params={"view": text})
    assert answer.json()["token_ids"] == expected_ids(body, View(5, 11, 40, 50, hflip=hflip))


def test_a_view_may_reach_every_border_of_the_upright_picture(client):
    body = lying_on_its_side()  # stored 90 wide and 50 high, upright 50 wide and 90 high
    answer = post(client, body, params={"view": "0,0,90,50"})
    assert answer.json()["token_ids"] == expected_ids(body, View(0, 0, 90, 50, hflip=False))
    assert post(client, body, params={"view": "0,0,50,90"}).status_code == 422


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded"]
)
def test_the_bytes_decide_and_not_the_content_type(client, content_type):
    png = encode_image(draw(), "PNG")
    answer = post(client, png, headers={"Content-Type": content_type})
    assert answer.json()["token_ids"] == expected_ids(png)


def test_a_chunked_body_is_read(client):
    body = jpeg()
    answer = post(client, iter([body[:100], body[100:]]))
    assert answer.json()["token_ids"] == expected_ids(body)


def test_a_residual_codebook_answers_with_one_id_per_stage():
    tokenizer = PatchTokenizer.load(make_codebook(num_stages=2, dtype=np.float32))
    with serving(create_app(tokenizer, model="residual")) as client:
        answer = post(client, jpeg()).json()
    assert answer["model"] == "residual"
    assert answer["shape"] == [*GRID, 2]
    assert len(answer["token_ids"]) == 32


def test_a_tokenizer_without_a_name_is_called_by_its_fingerprint():
    tokenizer = make_tokenizer()
    with serving(create_app(tokenizer)) as client:
        assert post(client, jpeg()).json()["model"] == tokenizer.fingerprint[:12]


def test_the_fingerprint_is_on_every_answer(client):
    fingerprint = make_codebook().fingerprint
    for answer in (post(client, jpeg()), post(client, b"no"), client.get("/healthz")):
        assert answer.headers["x-tokenizer-fingerprint"] == fingerprint


def test_the_answer_says_where_the_time_went(client):
    answer = post(client, jpeg(seed=77))
    entries = answer.headers["server-timing"].split(", ")
    assert [entry.split(";")[0] for entry in entries] == ["read", "decode", "queue", "infer"]
    assert all(float(entry.partition("dur=")[2]) >= 0 for entry in entries)
    assert answer.headers["x-batch-size"] == "1"


def test_the_model_list_says_what_may_be_asked(client):
    (model,) = client.get("/v1/models").json()["models"]
    limits = model.pop("limits")
    assert model == {
        "id": "tiny-k16",
        "fingerprint": make_codebook().fingerprint,
        "vocab_size": 16,
        "num_stages": 1,
        "grid": GRID,
        "image_size": 32,
        "patch_size": 8,
        "interpolation": "bicubic",
        "metric": "l2",
        "extractor": "pixel",
        "dtype": "uint8",
        "digest": make_codebook().header.digest,
        "decodes_to_pixels": True,
        "device": "cpu",
    }
    assert limits["max_body_bytes"] == 20_000_000
    assert limits["max_pixels"] == 50_000_000
    assert limits["max_batch"] == 8
    assert limits["max_queue"] == 64
    assert limits["decode_threads"] >= 1


def test_openapi_describes_the_picture_the_answer_and_the_refusals(client):
    document = client.get("/openapi.json").json()
    tokenize = document["paths"]["/v1/tokenize"]["post"]
    assert "image/*" in tokenize["requestBody"]["content"]
    example = tokenize["responses"]["200"]["content"]["application/json"]["example"]
    assert len(example["token_ids"]) == np.prod(example["shape"])
    refusals = {int(status) for status in tokenize["responses"]} - {200}
    assert refusals == {400, 401, 404, 406, 408, 413, 415, 422, 429, 500, 503, 504}
    for status in refusals:
        assert list(tokenize["responses"][str(status)]["content"]) == ["application/problem+json"]
    assert client.get("/docs").status_code == 200
