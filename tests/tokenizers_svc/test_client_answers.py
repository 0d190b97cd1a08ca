"""What an answer has to be, and what becomes of one that is not."""

import httpx
import msgpack
import numpy as np
import pytest

from cache_builder.formats.views import View
from tests.tokenizers_svc import moody
from tokenizers_svc.client import BadAnswerError, answers

MSGPACK = {"Content-Type": "application/vnd.msgpack"}


def response(answer):
    status, headers, body = answer
    request = httpx.Request("POST", "http://service/v1/tokenize?model=m")
    return httpx.Response(status, headers=headers, content=body, request=request)


def packed(fields, **headers):
    return response((200, MSGPACK | headers, msgpack.packb(fields)))


def as_bytes(values, dtype="<u2"):
    return np.array(values, dtype).tobytes()


def test_tokens_are_the_same_from_json_and_from_msgpack():
    fields = moody.tokens(5, view=[1, 2, 3, 4, True], image={"width": 9}, later=1)
    from_json = answers.read_tokens(response(moody.ok(fields)))
    from_msgpack = answers.read_tokens(packed(fields | {"token_ids": as_bytes([5, 6, 7, 8])}))
    for tokens in (from_json, from_msgpack):
        assert tokens.ids.tolist() == [[5, 6], [7, 8]]
        assert tokens.ids.dtype == np.uint16
        assert tokens.ids.flags.writeable
        assert (tokens.model, tokens.fingerprint) == ("m", moody.FINGERPRINT)
        assert tokens.view == View(1, 2, 3, 4, hflip=True)
        assert tokens.soft is None


def test_soft_targets_and_residual_ids_have_their_axes():
    soft = {"k": 2, "ids": as_bytes(range(4)), "probabilities": as_bytes([0.5] * 4, "<f2")}
    fields = moody.tokens() | {"shape": [2, 1, 2], "soft": soft}
    for tokens in (
        answers.read_tokens(packed(fields)),
        answers.read_tokens(
            response(
                moody.ok(
                    fields | {"soft": {"k": 2, "ids": [0, 1, 2, 3], "probabilities": [0.5] * 4}}
                )
            )
        ),
    ):
        assert tokens.ids.tolist() == [[[0, 1]], [[2, 3]]]
        assert tokens.soft.ids.tolist() == [[[0, 1]], [[2, 3]]]
        assert tokens.soft.probabilities.tolist() == [[[0.5, 0.5]], [[0.5, 0.5]]]


def test_the_timings_of_the_service_are_seconds():
    header = {"Server-Timing": "read;dur=1.50, decode;dur=20, cache;desc=hit, infer;dur=0.5"}
    tokens = answers.read_tokens(response(moody.ok(moody.tokens(), **header)))
    assert tokens.timings == {"read": 0.0015, "decode": 0.02, "infer": 0.0005}


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ((200, {"Content-Type": "text/html"}, b"<h1>hello</h1>"), "Expecting value"),
        ((200, {"Content-Type": "application/vnd.msgpack"}, b"\xc1"), "Format|format"),
        ((200, {"Content-Type": "application/vnd.msgpack"}, b""), "Unpack|incomplete"),
        (moody.ok([1]), "a list in place of"),
        (moody.ok(moody.tokens() | {"shape": [3, 3]}), "reshape"),
        (moody.ok(moody.tokens() | {"shape": [4]}), "shape"),
        (moody.ok(moody.tokens() | {"shape": [-1, 2]}), "shape"),
        (moody.ok(moody.tokens() | {"shape": "22"}), "not promise|promises"),
        (moody.ok(moody.tokens() | {"token_ids": [0, 1, 2, 70_000]}), "bounds|out of"),
        (moody.ok(moody.tokens() | {"token_ids": {"a": 1}}), "int"),
        (moody.ok(moody.tokens() | {"view": [1]}), "unpack"),
        (moody.ok(moody.tokens() | {"soft": {"k": 2, "ids": [1]}}), "reshape|lacks"),
        (moody.ok({"model": "m"}), "lacks 'shape'"),
    ],
)
def test_an_answer_that_is_none_is_refused(mood, reason):
    with pytest.raises(BadAnswerError, match=reason):
        answers.read_tokens(response(mood))


@pytest.mark.parametrize(
    "mood",
    [
        moody.npy(np.zeros((4, 4), np.uint8)),
        moody.npy(np.zeros((4, 4, 3), np.float32)),
        (200, {}, b"\x93NUMPY rubbish"),
        (200, {}, b""),
    ],
)
def test_pixels_that_are_none_are_refused(mood):
    with pytest.raises(BadAnswerError):
        answers.read_pixels(response(mood))


def test_a_reconstruction_without_its_headers_is_refused():
    with pytest.raises(BadAnswerError, match="lacks"):
        answers.read_reconstruction(response(moody.npy(np.zeros((4, 4, 3), np.uint8))))


def test_a_service_without_models_is_refused():
    with pytest.raises(BadAnswerError, match="no models"):
        answers.read_models(response(moody.ok({"models": []})))


@pytest.mark.parametrize(
    "items", [[], [{"index": 1, "token_ids": [0, 1, 2, 3]}, {"index": 0}], [1, 2], None]
)
def test_a_batch_answer_that_is_none_is_refused(items):
    fields = {"model": "m", "fingerprint": moody.FINGERPRINT, "shape": [2, 2], "items": items}
    with pytest.raises(BadAnswerError, match="http://service/v1/tokenize is not what"):
        answers.read_batch(response(moody.ok(fields)), 2)
