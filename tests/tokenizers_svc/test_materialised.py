"""Bodies that would become something large are refused before they do, with the limit's name."""

import struct
from pathlib import Path

import pytest

from tests.factories import peak_memory_since_reset
from tests.tokenizers_svc.support import check_problem, jpeg, post

NUM_VALUES = 4_000_000
LISTS = b'{"image": [' + b"[]," * NUM_VALUES + b"[]]}"
NESTED = b'{"image": ' + b"[" * NUM_VALUES
OBJECTS = b'{"image": [' + b"{}," * NUM_VALUES + b"{}]}"
PACKED = b"\x81\xa5image\xdd" + struct.pack(">I", NUM_VALUES) + b"\x90" * NUM_VALUES
PATHS = ["/v1/tokenize", "/v1/tokenize/batch", "/v1/detokenize", "/v1/reconstruct"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", LISTS),
        ("application/json", NESTED),
        ("application/json", OBJECTS),
        ("application/vnd.msgpack", PACKED),
    ],
    ids=["lists", "nested", "objects", "msgpack"],
)
def test_millions_of_values_are_refused_before_they_are_made(client, path, kind, body):
    post(client, jpeg())  # what is loaded once is no part of it
    answers = []

    def ask():
        answers.append(client.post(path, content=body, headers={"Content-Type": kind}))

    # Client and server are one process: each holds the body, whole and in pieces. As values it
    # would take 250 MB and more.
    assert peak_memory_since_reset(ask) < 5 * len(body) + 60_000_000
    assert answers[0].status_code in (400, 413, 415)
    check_problem(answers[0], answers[0].status_code, answers[0].json()["code"])


def test_a_form_of_thousands_of_parts_is_refused(client):
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\na\r\n'
    answer = client.post(
        "/v1/tokenize/batch",
        content=part * 50_000 + b"--x--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    problem = check_problem(answer, 413, "batch-too-large")
    assert problem["limit"] == 64
