"""HTTP by hand, for what no client would send."""

import contextlib
import json
import socket

HEAD = b"GET /healthz HTTP/1.1\r\nHost: here\r\n"
WHOLE = HEAD + b"\r\n"
POST = b"POST /v1/tokenize HTTP/1.1\r\nHost: here\r\n"


def connect(client, receive_buffer=None):
    connection = socket.socket()
    connection.settimeout(20)
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((client.base_url.host, client.base_url.port))
    return connection


def read_to_end(connection):
    """All that the server sends until it closes."""
    parts = []
    with connection, contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


def exchange(client, sent):
    connection = connect(client)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(sent)
    return read_to_end(connection)


def check_refusal(answer, status, code):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer[:200]
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    problem = json.loads(body)
    assert problem["code"] == code
    return problem


def chunked(*parts):
    return POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(parts)


def can_connect(client):
    try:
        socket.create_connection((client.base_url.host, client.base_url.port)).close()
    except ConnectionError:
        return False
    return True


def send_for_ever(connection, piece, most_bytes):
    """Send the same bytes again and again until the other side ends it; gives how many it took."""
    num_bytes = 0
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while num_bytes < most_bytes:
            connection.sendall(piece)
            num_bytes += len(piece)
    return num_bytes
