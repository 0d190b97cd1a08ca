"""Requests that httptools lets pass, or takes in whatever length; all on real sockets."""

import json
import re

import pytest

from tests.tokenizers_svc.sockets import (
    HEAD,
    POST,
    WHOLE,
    check_refusal,
    chunked,
    connect,
    exchange,
    read_to_end,
    send_for_ever,
)
from tests.tokenizers_svc.support import (
    expected_ids,
    jpeg,
    make_tokenizer,
    open_request,
    post,
    serving,
    wait_until,
)
from tokenizers_svc.app import create_app
from tokenizers_svc.limits import Limits

BODY = jpeg()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
MEGABYTE = b"a" * 1_000_000
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LAST = b"Connection: close\r\n"


@pytest.fixture(scope="module")
def client():
    limits = Limits(max_batch_body_bytes=2_000_000)
    app = create_app(make_tokenizer(), limits=limits)
    with serving(app) as client:
        client.service = app.state.service
        yield client


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (HEAD + b"X: ", MEGABYTE),
        (HEAD, b"X: a\r\n" * 100_000),
        (HEAD, b":\r\n" * 100_000),
        (b"GET /", MEGABYTE),
        (b"", b"\r\n" * 500_000),
        (chunked(b"5;"), MEGABYTE),
        (chunked(b"5;x=\""), MEGABYTE),
        (chunked(b"1\r\na\r\n0\r\nX: "), MEGABYTE),
        (chunked(b"1\r\na\r\n0\r\n"), b"X: a\r\n" * 100_000),
    ],
    ids=[
        "header", "headers", "no names", "target", "nothing", "extension", "quoted extension",
        "trailer", "trailers",
    ],
)  # fmt: skip
def test_what_has_no_end_is_refused_while_it_arrives(client, start, piece):
    connection = connect(client)
    connection.sendall(start)
    assert send_for_ever(connection, piece, 200_000_000) < 50_000_000
    answer = read_to_end(connection)
    # A reset may overtake the answer while megabytes are still being sent.
    assert not answer or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    wait_until(lambda: client.service.door.num_pictures == 0)
    assert post(client, BODY).json()["token_ids"] == expected_ids(BODY)


def test_a_head_may_be_as_long_as_the_limit_and_no_longer(client):
    def status_of(num_bytes, num_fields):
        fields = [b"X: " + b"a" * (num_bytes // num_fields - 5) + b"\r\n"] * num_fields
        return exchange(client, HEAD + LAST + b"".join(fields) + b"\r\n")[9:12]

    assert status_of(65_000, 1) == status_of(65_000, 200) == b"200"
    assert status_of(66_000, 1) == status_of(66_000, 200) == b"431"
    assert status_of(6_000, 300) == b"431"


@pytest.mark.parametrize(
    "fields",
    [
        LENGTH + CHUNKED,
        CHUNKED + LENGTH,
        LENGTH + LENGTH,
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"Content-Length : 5\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        CHUNKED + CHUNKED,
        CHUNKED + b"Transfer-Encoding: identity\r\n",
        CHUNKED + b"Connection: upgrade\r\nUpgrade: h2c\r\n",
        b"X: a\r\n b\r\n",
        b"X: a\0b\r\n",
        b"X: a\rb\r\n",
        b"X: a\nY: b\r\n",
        b"Host: elsewhere\r\n",
        b"X\xe9: a\r\n",
    ],
)
def test_a_request_that_two_programs_may_read_in_two_ways_is_refused(client, fields):
    answer = exchange(client, POST + fields + b"\r\n" + b"0\r\n\r\n" + WHOLE)
    check_refusal(answer, 400, "bad-request")
    assert answer.count(b"HTTP/1.1 4") == 1


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET /healthz HTTP/2.0\r\nHost: here\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n",
        b"GET /healthz HTTP/0.9\r\n",
        b"GET /healthz\r\n",
        b"GET /healthz HTTP/1.1\r\n",
        b"get /healthz HTTP/1.1\r\nHost: here\r\n",
        b"GET /health\xe9 HTTP/1.1\r\nHost: here\r\n",
        b"GET /health\0z HTTP/1.1\r\nHost: here\r\n",
        b"GET http://here HTTP/1.1\r\nHost: here\r\n",
        b"GET ?view=1 HTTP/1.1\r\nHost: here\r\n",
        b"CONNECT here:443 HTTP/1.1\r\nHost: here\r\n",
        b"POST /v1/tokenize HTTP/1.0\r\nHost: here\r\nTransfer-Encoding: chunked\r\n",
    ],
)
def test_a_request_of_no_known_form_is_refused(client, request_line):
    check_refusal(exchange(client, request_line + b"\r\n"), 400, "bad-request")


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET http://here/healthz HTTP/1.1\r\nHost: here\r\n",
        b"GET /healthz HTTP/1.0\r\n",
        b"\r\n\r\nGET /health%7A HTTP/1.1\r\nHost: here\r\n",
    ],
)
def test_a_request_of_an_unusual_form_is_served(client, request_line):
    assert exchange(client, request_line + LAST + b"\r\n").startswith(b"HTTP/1.1 200 ")


def test_a_field_of_a_trailer_is_not_taken_for_one_of_the_head(client):
    parts = [b"%x\r\n" % len(BODY), BODY, b"\r\n0\r\nX-Request-Id: of-the-trailer\r\n\r\n"]
    answer = exchange(client, chunked(*parts) + HEAD + LAST + b"\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert b"of-the-trailer" not in answer


@pytest.mark.parametrize("num_pieces", [1, 7])
def test_a_body_is_read_although_the_request_asks_for_another_protocol(client, num_pieces):
    asks = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    sent = POST + asks + LENGTH + b"\r\n" + BODY + HEAD + asks + b"\r\n" + HEAD + LAST + b"\r\n"
    size = -(-len(sent) // num_pieces)
    connection = connect(client)
    for start in range(0, len(sent), size):
        connection.sendall(sent[start : start + size])
    first, *others = read_to_end(connection).split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert json.loads(first.partition(b"\r\n\r\n")[2])["token_ids"] == expected_ids(BODY)
    assert len(others) == 2


@pytest.mark.parametrize("broken", [b"hello\r\n\r\n", HEAD + b"X: a\0b\r\n", chunked(b"x\r\n")])
def test_what_comes_before_a_broken_request_is_answered_first(client, broken):
    answer = exchange(client, POST + LENGTH + b"\r\n" + BODY + WHOLE + broken)
    first, second, refusal = re.split(rb"HTTP/1.1 (?=[1-5])", answer)[1:]
    assert json.loads(first.partition(b"\r\n\r\n")[2])["token_ids"] == expected_ids(BODY)
    assert second.startswith(b"200 ")
    check_refusal(b"HTTP/1.1 " + refusal, 400, "bad-request")


def test_of_thousands_of_requests_at_once_the_first_are_answered(client):
    answer = exchange(client, WHOLE * 5000)
    first, _, refusal = answer.rpartition(b"HTTP/1.1 ")
    assert 33 <= first.count(b"HTTP/1.1 200 ") < 4000
    check_refusal(b"HTTP/1.1 " + refusal, 400, "bad-request")


def test_of_a_body_that_nobody_wants_so_much_is_read_and_no_more(client):
    refused = open_request(
        client, b"", headers=["Content-Encoding: gzip", "Content-Length: 1000000000"]
    )
    assert refused.recv(12) == b"HTTP/1.1 415"
    with refused:
        assert send_for_ever(refused, MEGABYTE, 1_000_000_000) < 50_000_000


def test_a_connection_is_of_use_after_a_body_that_nobody_wanted():
    app = create_app(make_tokenizer(), limits=Limits(keep_alive_s=0.2))
    with serving(app, wait=False) as client:
        unwanted = open_request(client, MEGABYTE, headers=["Content-Encoding: gzip"])
        unwanted.sendall(WHOLE)
        answer = read_to_end(unwanted)
        assert answer.startswith(b"HTTP/1.1 415 ")
        assert answer.endswith(b'{"status":"alive"}')


def test_a_connection_that_sent_a_body_that_nobody_wanted_is_closed_when_idle():
    app = create_app(make_tokenizer(), limits=Limits(keep_alive_s=0.2))
    with serving(app, wait=False) as client:
        unwanted = open_request(client, MEGABYTE, num_sent=10, headers=["Content-Encoding: gzip"])
        assert unwanted.recv(12) == b"HTTP/1.1 415"
        unwanted.sendall(MEGABYTE[10:])
        assert read_to_end(unwanted).endswith(b"}")


def test_a_client_that_was_refused_before_it_sent_its_body_is_let_go(client):
    expect = ["Expect: 100-continue", "Content-Encoding: gzip", "Content-Length: 100"]
    answer = read_to_end(open_request(client, b"", headers=expect))
    assert answer.startswith(b"HTTP/1.1 415 ")
