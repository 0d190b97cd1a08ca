"""However a picture is sent, it has the same ids; what is wrong with a body is said."""

import json

import msgpack
import pytest

from cache_builder.formats.views import View
from tests.tokenizers_svc.sending import BODIES, b64, send
from tests.tokenizers_svc.support import check_problem, draw, encode_image, expected_ids, jpeg

PACKED = {"Content-Type": "application/msgpack"}


@pytest.mark.parametrize("kind", BODIES)
def test_every_body_has_the_ids_of_the_library(client, kind):
    body = jpeg(seed=3)
    assert send(client, kind, body).json()["token_ids"] == expected_ids(body)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("view", [(5, 11, 40, 50), (5, 11, 40, 50, True)])
def test_every_body_may_name_a_view(client, kind, view):
    body = jpeg(seed=4)
    answer = send(client, kind, body, view).json()
    expected = View(*view[:4], hflip=len(view) == 5)
    assert answer["token_ids"] == expected_ids(body, expected)
    assert answer["view"] == list(expected)


def test_a_view_may_be_null_and_its_mirroring_a_number(client):
    body = jpeg(seed=5)
    for view, expected in ((None, None), ([1, 2, 30, 31, 1], View(1, 2, 30, 31, hflip=True))):
        fields = {"image": {"b64": b64(body)}, "view": view}
        answer = client.post("/v1/tokenize", json=fields)
        assert answer.json()["token_ids"] == expected_ids(body, expected)


@pytest.mark.parametrize("path", ["/v1/tokenize", "/v1/tokenize/batch"])
def test_urls_are_never_fetched(client, path):
    picture = {"image": {"url": "http://127.0.0.1:9/secret.jpg"}}
    fields = picture if path == "/v1/tokenize" else {"items": [picture]}
    answer = client.post(path, json=fields)
    problem = check_problem(answer, 400, "bad-request")
    assert "URLs are never fetched" in problem["errors"][0]["message"]
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({}, "/image"),
        ({"image": None}, "/image"),
        ({"image": {}}, "/image/b64"),
        ({"image": {"b64": 7}}, "/image/b64"),
        ({"image": {"b64": "?"}}, "/image/b64"),
        ({"image": {"b64": "AAA"}}, "/image/b64"),
        ({"image": {"b64": "AAAé"}}, "/image/b64"),
        ({"image": {"b64": "", "size": 3}}, "/image"),
        ({"image": {"b64": ""}, "view": [0, 0, 5]}, "/view"),
        ({"image": {"b64": ""}, "view": [0, 0, 5, 5.0]}, "/view"),
        ({"image": {"b64": ""}, "view": [0, 0, 5, -5]}, "/view"),
        ({"image": {"b64": ""}, "view": [0, 0, 5, 5, 2]}, "/view"),
        ({"image": {"b64": ""}, "view": [True, 0, 5, 5]}, "/view"),
        ({"image": {"b64": ""}, "view": "0,0,5,5"}, "/view"),
        ({"image": {"b64": ""}, "veiw": None}, ""),
    ],
)
def test_what_is_wrong_with_json_and_msgpack_is_pointed_at(client, fields, pointer):
    for answer in (
        client.post("/v1/tokenize", json=fields),
        client.post("/v1/tokenize", content=msgpack.packb(fields), headers=PACKED),
    ):
        problem = check_problem(answer, 400, "bad-request")
        assert pointer in [error["pointer"] for error in problem["errors"]]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"image": NaN}'])
@pytest.mark.parametrize("kind", ["application/json", "application/msgpack"])
def test_what_is_no_object_is_refused(client, content, kind):
    answer = client.post("/v1/tokenize", content=content, headers={"Content-Type": kind})
    check_problem(answer, 400, "bad-request" if content else "empty-body")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"image":' * 10_000,
        b'{"image":[' + b"0," * 1000 + b"0]}",
        b"{" + b",".join(b'"%d":0' % i for i in range(1000)) + b"}",
    ],
    ids=["brackets", "braces", "long list", "many names"],
)
def test_json_of_more_values_than_a_picture_needs_is_refused_unparsed(client, content):
    answer = client.post(
        "/v1/tokenize", content=content, headers={"Content-Type": "application/json"}
    )
    assert "more values" in check_problem(answer, 400, "bad-request")["detail"]


@pytest.mark.parametrize(
    "fields",
    [
        {"image": [0] * 1000},
        {"image": [[[0] * 20] * 20] * 20},
        {"image": {str(i): 0 for i in range(1000)}},
        {"image": msgpack.ExtType(5, bytes(100))},
    ],
    ids=["long list", "nested lists", "many names", "extension"],
)
def test_msgpack_of_more_values_than_a_picture_needs_is_refused(client, fields):
    answer = client.post("/v1/tokenize", content=msgpack.packb(fields), headers=PACKED)
    check_problem(answer, 400, "bad-request")


def test_msgpack_that_promises_more_than_it_has_is_refused(client):
    for content in (b"\x81\xa5image\xc6\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\x91" * 5000):
        answer = client.post("/v1/tokenize", content=content, headers=PACKED)
        check_problem(answer, 400, "bad-request")


def test_base64_that_is_too_long_is_refused_undecoded(small):
    # It is no base64; that would be told if it were decoded.
    answer = small.post("/v1/tokenize/batch", json={"items": [{"image": {"b64": "?" * 30_000}}]})
    problem = check_problem(answer, 413, "body-too-large")
    assert problem["limit"] == 20_000
    assert problem["actual"] == 22_500


@pytest.mark.parametrize("num_bytes", [19_998, 19_999, 20_000])
def test_the_padding_of_base64_does_not_count_as_bytes_of_the_picture(small, num_bytes):
    items = [{"image": {"b64": b64(bytes(num_bytes))}}]
    (item,) = small.post("/v1/tokenize/batch", json={"items": items}).json()["items"]
    assert item["error"]["code"] == "not-an-image"


def test_a_view_named_twice_is_refused(client):
    answer = send(client, "json", jpeg(), [0, 0, 5, 5], params={"view": "0,0,5,5"})
    assert "twice" in check_problem(answer, 400, "bad-request")["detail"]


@pytest.mark.parametrize(
    ("files", "data"),
    [
        ({"picture": b"x"}, None),
        ({"file": b"x"}, {"veiw": "0,0,5,5"}),
        ({"file": (None, b"x")}, None),
    ],
    ids=["other name", "other field", "no file"],
)
def test_a_form_of_other_parts_is_told_how_to_send_a_picture(client, files, data):
    answer = client.post("/v1/tokenize", files=files, data=data)
    assert "curl -F file=@photo.jpg" in check_problem(answer, 400, "bad-request")["detail"]


def test_a_form_of_several_files_is_refused(client):
    files = [("file", b"a"), ("file", b"b")]
    answer = client.post("/v1/tokenize", files=files)
    assert check_problem(answer, 413, "batch-too-large")["limit"] == 1


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"x"),
        ("multipart/form-data; boundary=b", b"--b\r\nno header\r\n\r\nx\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\n\r\n"),
        ("multipart/form-data; boundary=" + "b" * 5000, b"x"),
        ("multipart/form-data; boundary=b; charset=nonsense", b"--b--\r\n"),
    ],
)
def test_a_malformed_form_is_refused(client, kind, content):
    answer = client.post("/v1/tokenize", content=content, headers={"Content-Type": kind})
    check_problem(answer, 400, "bad-request")


def test_a_field_of_a_form_is_never_long(client):
    answer = client.post("/v1/tokenize", files={"file": b"x"}, data={"view": "0" * 100_000})
    check_problem(answer, 400, "bad-request")


def test_a_file_of_a_form_lies_in_memory_and_on_no_disk(client, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", None)  # called when a file is spilled
    large = encode_image(draw((1200, 900)), "PNG")
    assert len(large) > 1_100_000
    answer = send(client, "multipart", large)
    assert answer.json()["token_ids"] == expected_ids(large)


def test_the_answer_says_what_the_picture_turned_out_to_be(client):
    answer = send(client, "json", encode_image(draw((70, 50)), "WEBP")).json()
    assert answer["image"] == {"width": 70, "height": 50, "format": "WEBP"}
    assert answer["view"] == [0, 10, 50, 50, False]
    assert json.dumps(answer)
