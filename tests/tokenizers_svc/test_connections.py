"""Slow and rude clients, on real sockets: nothing waits without an end, and nobody else suffers."""

import asyncio
import contextlib
import json
import socket
import struct
import threading

import pytest
import uvicorn

from tests.tokenizers_svc.sockets import (
    HEAD,
    POST,
    WHOLE,
    can_connect,
    check_refusal,
    chunked,
    connect,
    exchange,
    read_to_end,
)
from tests.tokenizers_svc.support import (
    WatchedTokenizer,
    expected_ids,
    jpeg,
    make_tokenizer,
    open_request,
    post,
    read_answer,
    serving,
    wait_until,
)
from tokenizers_svc import connections
from tokenizers_svc.app import create_app
from tokenizers_svc.connections import bounded_config
from tokenizers_svc.limits import Limits

BODY = jpeg()


@contextlib.contextmanager
def service(**limits):
    tokenizer = WatchedTokenizer()
    app = create_app(tokenizer, limits=Limits(**limits))
    with serving(app) as client:
        client.service = app.state.service
        client.tokenizer = tokenizer
        try:
            yield client
        finally:
            tokenizer.may_run.set()


@pytest.fixture(scope="module")
def hasty():
    """A service that has no time."""
    with service(header_timeout_s=0.3, body_timeout_s=0.3, send_timeout_s=0.3) as client:
        yield client


@pytest.fixture(scope="module")
def patient():
    with service() as client:
        yield client


def check_service(client):
    assert post(client, BODY).json()["token_ids"] == expected_ids(BODY)


@contextlib.contextmanager
def pieces_received():
    """A service that only listens; gives the sizes in which bodies came to it."""
    sizes = []

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
            sizes.append(len(message.get("body", b"")))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    with running(app) as connection:
        yield connection, sizes


@contextlib.contextmanager
def running(app):
    """A connection to a server of an application."""
    config = bounded_config(app, Limits().resolved(on_cpu=True, num_cores=1), lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            with socket.create_connection(listener.getsockname(), timeout=20) as connection:
                yield connection
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.parametrize(("num_bytes", "num_pieces"), [(150_000, 1), (1_000_000, 4)])
def test_a_body_with_a_length_comes_in_as_few_pieces_as_it_may(num_bytes, num_pieces):
    with pieces_received() as (connection, sizes):
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % num_bytes)
        for _ in range(num_bytes // 10_000):
            connection.sendall(bytes(10_000))
        assert connection.recv(1000).startswith(b"HTTP/1.1 204 ")
    assert sum(sizes) == num_bytes
    assert len(sizes) <= num_pieces


@contextlib.contextmanager
def answering(*messages):
    """A connection to a service that sends the same messages to everyone."""

    async def app(scope, receive, send):
        for message in messages:
            await send({"type": "http.response.body", **message})
            await asyncio.sleep(0.05)

    with running(app) as connection:
        yield connection


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]}
FOREVER = {"type": "http.response.start", "status": 200, "headers": []}


def test_the_head_of_an_answer_comes_with_its_body():
    with answering(START, {"body": b"ab", "more_body": True}, {"body": b"cd"}) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        first = connection.recv(1000)
        assert first.startswith(b"HTTP/1.1 200 OK\r\n")
        assert first.endswith(b"\r\n\r\nab")
        assert connection.recv(1000) == b"cd"


def test_a_head_without_a_body_comes_when_the_answer_ends():
    with answering(START, {}) as connection:
        for _ in range(2):
            connection.sendall(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(1000).endswith(b"content-length: 4\r\n\r\n")


def test_a_head_whose_body_never_comes_is_sent_before_the_connection_is_closed():
    with answering(FOREVER) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_body_in_chunks_is_passed_on_as_it_comes():
    with pieces_received() as (connection, sizes):
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        wait_until(lambda: sizes == [1])
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 204 ")


def test_a_connection_that_says_nothing_is_closed(hasty):
    assert read_to_end(connect(hasty)) == b""


def test_a_head_that_stops_in_the_middle_is_given_up(hasty):
    problem = check_refusal(exchange(hasty, HEAD), 408, "header-timeout")
    assert problem["limit"] == 0.3


def test_a_head_that_drips_has_no_more_time(hasty):
    connection = connect(hasty)
    connection.sendall(HEAD + b"X: ")
    dripping = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            while not dripping.wait(0.05):
                connection.sendall(b"a")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        check_refusal(read_to_end(connection), 408, "header-timeout")
    finally:
        dripping.set()
        thread.join()


def test_the_second_head_of_a_connection_is_given_up_too(hasty):
    answer = exchange(hasty, WHOLE + HEAD)
    first, _, second = answer.partition(b'{"status":"alive"}')
    assert first.startswith(b"HTTP/1.1 200 ")
    check_refusal(second, 408, "header-timeout")


def test_a_body_that_nobody_wants_is_not_read_for_ever(hasty):
    connection = open_request(hasty, BODY, num_sent=10, headers=["Content-Encoding: gzip"])
    answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 415 ")


def test_a_client_that_does_not_read_its_answer_is_cut_off(hasty):
    server_side = hasty.service
    connection = connect(hasty, receive_buffer=4096)
    request = b"GET /openapi.json HTTP/1.1\r\nHost: here\r\n\r\n"
    stop = threading.Event()

    def ask():
        with contextlib.suppress(OSError):
            while not stop.is_set():
                connection.sendall(request)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        thread.join(20)  # ends when the server has closed the connection
        assert not thread.is_alive()
    finally:
        stop.set()
        connection.close()
        thread.join()
    assert server_side.door.num_pictures == 0
    check_service(hasty)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"hello\r\n\r\n", 400, "bad-request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n", 400, "bad-request"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400, "bad-request"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "bad-request"),
        (HEAD + b"Content-Length: 5, 6\r\n\r\n", 400, "bad-request"),
        (HEAD + b"X: a\0b\r\n\r\n", 400, "bad-request"),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 400, "bad-request"),
        (HEAD + b"X-Long: " + b"a" * 3_000_000, 431, "header-too-large"),
        (HEAD + b"X: a\r\n" * 500_000, 431, "header-too-large"),
    ],
)  # fmt: skip
def test_what_is_no_http_is_a_problem_like_any_other(patient, sent, status, code):
    answer = exchange(patient, sent)
    if answer:  # a reset may overtake it while megabytes are still being sent
        check_refusal(answer, status, code)
    else:
        assert len(sent) > 1_000_000
    check_service(patient)


@pytest.mark.parametrize(
    "parts",
    [
        (b"5;" + b"a" * 2_000_000,),
        (b"1\r\na\r\n0\r\n", b"X: a\r\n" * 400_000),
        (b"fffffffffffffffffffff\r\n",),
        (b"-5\r\nhello\r\n",),
        (b"5\r\nhelloXX",),
    ],
    ids=["extension", "trailer", "length", "negative", "no end"],
)
def test_endless_or_broken_chunks_are_refused(patient, parts):
    answer = exchange(patient, chunked(*parts))
    assert not answer or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    wait_until(lambda: patient.service.door.num_pictures == 0)
    check_service(patient)


def test_a_picture_in_chunks_of_one_byte_is_read(patient):
    parts = [b"1\r\n" + BODY[i : i + 1] + b"\r\n" for i in range(len(BODY))]
    connection = connect(patient)
    connection.sendall(chunked(*parts, b"0\r\nX-Trailer: fine\r\n\r\n"))
    status, answer = read_answer(connection)
    assert status == 200
    assert json.loads(answer)["token_ids"] == expected_ids(BODY)


def test_a_reset_in_the_middle_of_a_body_frees_its_place(patient):
    connection = open_request(patient, BODY, num_sent=100)
    wait_until(lambda: patient.service.door.num_pictures == 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    wait_until(lambda: patient.service.door.num_pictures == 0)
    check_service(patient)


def test_a_half_closed_connection_frees_its_place(patient):
    connection = open_request(patient, BODY, num_sent=100)
    wait_until(lambda: patient.service.door.num_pictures == 1)
    connection.shutdown(socket.SHUT_WR)
    wait_until(lambda: patient.service.door.num_pictures == 0)
    connection.close()
    check_service(patient)


def test_a_client_that_hangs_up_with_requests_waiting_frees_its_place():
    with service(max_batch=1) as client:
        client.tokenizer.may_run.clear()
        connection = open_request(client, BODY)
        wait_until(lambda: client.service.door.num_pictures == 1)
        connection.sendall(WHOLE * 3)
        connection.close()
        wait_until(lambda: client.service.door.num_pictures == 0)
        client.tokenizer.may_run.set()
        check_service(client)


def test_pipelined_requests_are_answered_in_turn(patient):
    paths = [b"/healthz", b"/version", b"/nothing", b"/readyz"]
    requests = [b"GET %s HTTP/1.1\r\nHost: here\r\n\r\n" % path for path in paths]
    requests[-1] = requests[-1].replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    answer = exchange(patient, b"".join(requests))
    statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"200", b"404", b"200"]


def test_a_client_that_asks_whether_it_may_go_on_is_told(patient):
    expect = ["Expect: 100-continue"]
    connection = open_request(patient, BODY, num_sent=0, headers=expect)
    assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"[:25]
    connection.sendall(BODY)
    status, answer = read_answer(connection)
    assert status == 200
    assert json.loads(answer)["token_ids"] == expected_ids(BODY)
    too_much = [*expect, "Content-Length: 1000000000"]
    status, _ = read_answer(open_request(patient, b"", headers=too_much))
    assert status == 413


def test_idle_connections_make_room_for_those_that_ask():
    with service(max_connections=8) as client, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(client)) for _ in range(40)]
        check_service(client)
        assert idle[0].recv(1) == b""
        for connection in idle[-3:]:
            connection.sendall(WHOLE)
            assert connection.recv(20).startswith(b"HTTP/1.1 200")


def test_when_all_connections_are_at_work_a_new_one_is_told_so():
    with service(max_connections=3, max_batch=1) as client, contextlib.ExitStack() as stack:
        client.tokenizer.may_run.clear()
        client.close()  # its own connection would be the fourth
        working = [open_request(client, BODY) for _ in range(3)]
        wait_until(lambda: client.service.door.num_pictures == 3)
        problem = check_refusal(exchange(client, WHOLE), 503, "too-many-connections")
        assert problem["limit"] == 3
        client.tokenizer.may_run.set()
        for connection in working:
            assert read_answer(stack.enter_context(connection))[0] == 200


def test_a_thousand_connections_at_once_are_all_answered():
    with service(max_connections=2000) as client:
        crowd = [connect(client) for _ in range(1000)]
        for connection in crowd:
            connection.sendall(WHOLE)
        for connection in crowd:
            assert read_answer(connection)[0] == 200


def test_a_request_on_its_way_is_answered_although_the_service_leaves(monkeypatch):
    monkeypatch.setattr(connections, "_LEAVING_S", 20)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(serving(create_app(make_tokenizer())))
        early = connect(client)
        client.get("/healthz")  # connections are accepted in turn
        leaving = threading.Thread(target=stack.pop_all().close)
    leaving.start()
    wait_until(lambda: not can_connect(client))
    early.sendall(WHOLE)
    answer = read_to_end(early)
    leaving.join(20)
    assert answer.startswith(b"HTTP/1.1 200 ")
