"""What is refused, and what the client is told."""

import re
import struct
import zlib

import pytest
from PIL import Image

from tests.factories import peak_memory_since_reset
from tests.tokenizers_svc.support import (
    check_problem,
    draw,
    encode_image,
    expected_ids,
    jpeg,
    make_tokenizer,
    open_request,
    post,
    read_answer,
    serving,
)
from tokenizers_svc.app import create_app
from tokenizers_svc.limits import Limits


def blank_png(width, height):
    """A PNG of zeros; small as a file, whatever its size as a picture."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def corrupt_png():
    data = bytearray(encode_image(draw(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


BAD_PICTURES = {
    "empty": (b"", 400, "empty-body"),
    "text": (b"Hello, I am not a picture.", 415, "not-an-image"),
    "truncated jpeg": (jpeg()[: len(jpeg()) // 2], 422, "corrupt-image"),
    "truncated png": (encode_image(draw(), "PNG")[:-2000], 422, "corrupt-image"),
    "corrupt png": (corrupt_png(), 422, "corrupt-image"),
    "header of a jpeg alone": (jpeg()[:10], 422, "corrupt-image"),
    "float tiff": (encode_image(draw(mode="F"), "TIFF"), 422, "corrupt-image"),
    "postscript": (encode_image(draw(), "EPS"), 415, "not-an-image"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_a_bad_picture_is_refused_with_a_reason_and_the_next_one_is_served(client, kind):
    body, status, code = BAD_PICTURES[kind]
    check_problem(post(client, body), status, code)
    good = jpeg()
    assert post(client, good).json()["token_ids"] == expected_ids(good)


def test_a_refused_picture_comes_with_the_decoders_reason(client):
    problem = post(client, encode_image(draw(mode="F"), "TIFF")).json()
    assert "no defined range; convert them to 8 or 16 bits" in problem["detail"]


def test_a_reason_ends_in_one_full_stop_whoever_gave_it(client):
    for body in (jpeg()[: len(jpeg()) // 2], encode_image(draw(mode="F"), "TIFF")):
        assert re.search(r"[^.]\.$", post(client, body).json()["detail"])


def test_a_refusal_never_repeats_the_input(client):
    secret = "do-not-repeat-me"
    answers = [
        post(client, (secret * 100).encode()),
        post(client, jpeg() + secret.encode(), params={"view": secret}),
        post(client, jpeg(), params={secret: secret}),
        post(client, jpeg(), headers={"Content-Type": f"application/{secret}+json"}),
        post(client, jpeg(), headers={"Content-Encoding": secret}),
        client.get(f"/{secret}"),
    ]
    for answer in answers:
        assert 400 <= answer.status_code < 500
        assert secret not in answer.text


def test_a_compressed_body_is_refused_undecompressed(client):
    answer = post(client, zlib.compress(jpeg()), headers={"Content-Encoding": "gzip"})
    check_problem(answer, 415, "unsupported-body")
    assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("view", ["0,0,61,10", "1,0,60,10", "0,80,1,1", "0,0,0,10", "0,0,1,81"])
def test_a_view_outside_the_picture_is_refused_and_told_its_size(client, view):
    problem = check_problem(post(client, jpeg(), params={"view": view}), 422, "view-outside")
    assert "60 pixels high and 80 wide" in problem["detail"]


@pytest.mark.parametrize(
    "view",
    ["", "1,2,3", "a,b,c,d", "0,0,-1,5", "0,0,5,5,2", "0,0,5,5,1,1", "0,0,5.5,5", "0, 0,5,5"],
)
def test_a_malformed_view_is_refused_with_an_example(client, view):
    problem = check_problem(post(client, jpeg(), params={"view": view}), 400, "bad-request")
    assert "view=0,32,224,224,1" in problem["detail"]


@pytest.mark.parametrize("query", ["veiw=0,0,5,5", "view=0,0,5,5&view=0,0,6,6", "view=0,0,5,5&k=1"])
def test_a_misspelt_or_repeated_parameter_is_refused_rather_than_ignored(client, query):
    answer = client.post(f"/v1/tokenize?{query}", content=jpeg())
    check_problem(answer, 400, "bad-request")


def test_an_unknown_path_is_a_problem_too(client):
    check_problem(client.get("/v2/tokenize"), 404, "not-found")


def test_headers_of_a_megabyte_are_refused(client):
    try:
        status, _ = read_answer(open_request(client, b"", headers=["X-Long: " + "a" * 1_000_000]))
    except (BrokenPipeError, ConnectionResetError):
        return  # closed while they were still being sent
    assert status == 431


def test_a_trailing_slash_is_another_path(client):
    check_problem(client.post("/v1/tokenize/", content=jpeg()), 404, "not-found")


def test_a_wrong_method_is_told_the_right_one(client):
    answer = client.get("/v1/tokenize")
    check_problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"


def test_a_body_that_announces_too_much_is_refused_before_it_is_sent(client):
    connection = open_request(client, b"", headers=["Content-Length: 1000000000000"])
    status, body = read_answer(connection)
    assert status == 413
    assert b'"limit":20000000,"actual":1000000000000' in body


def test_a_chunked_body_is_cut_off_at_the_limit():
    limits = Limits(max_body_bytes=100_000)
    with serving(create_app(make_tokenizer(), limits=limits)) as client:
        answer = post(client, (bytes(10_000) for _ in range(50)))
        problem = check_problem(answer, 413, "body-too-large")
        assert problem["limit"] == 100_000
        assert post(client, jpeg()).status_code == 200


def test_a_body_that_stops_arriving_is_given_up():
    limits = Limits(body_timeout_s=0.2, max_queue=1)
    with serving(create_app(make_tokenizer(), limits=limits)) as client:
        body = jpeg()
        status, answer = read_answer(open_request(client, body, num_sent=500))
        assert status == 408
        assert b"within 0.2 s" in answer
        assert post(client, body).status_code == 200


def test_a_decompression_bomb_is_refused_from_its_header(client):
    bomb = blank_png(8000, 7000)
    assert len(bomb) < 200_000
    answers = []
    peak = peak_memory_since_reset(lambda: answers.append(post(client, bomb)))
    assert peak < 30_000_000  # 168 MB decoded
    problem = check_problem(answers[0], 413, "image-too-large")
    assert problem["limit"] == 50_000_000
    assert problem["actual"] == 56_000_000
    assert "8000 x 7000" in problem["detail"]


def test_a_bomb_beyond_pillows_own_guard_is_refused_alike(client):
    body = bytearray(encode_image(Image.new("L", (8, 8)), "PNG"))
    body[16:24] = struct.pack(">II", 60_000, 60_000)
    body[29:33] = struct.pack(">I", zlib.crc32(body[12:29]))
    check_problem(post(client, bytes(body)), 413, "image-too-large")


def test_a_harmless_request_id_is_kept_and_any_other_replaced(client):
    def id_for(text):
        return client.get("/healthz", headers={"X-Request-Id": text}).headers["x-request-id"]

    assert id_for("batch-7.item_3") == "batch-7.item_3"
    for text in ("a b", "x" * 65, "<script>", ""):
        assert id_for(text) not in ("", text)
    assert id_for("<") != id_for("<")
