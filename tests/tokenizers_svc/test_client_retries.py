"""When the client asks again, and when it gives up; no network, and no time passes."""

import random
from email.utils import formatdate

import httpx
import pytest

from cache_builder.errors import ConfigError
from tests.tokenizers_svc import moody
from tokenizers_svc.client import BadAnswerError, ProblemError, Retries, ServiceUnavailableError
from tokenizers_svc.client.retries import Call, Pause, exchange, retry_after

CALL = Call("GET", "/v1/models")


def response(answer):
    status, headers, body = answer
    request = httpx.Request("GET", "http://service/v1/models")
    return httpx.Response(status, headers=headers, content=body, request=request)


def drive(events, retries=None):
    """Play a network in which `events` happen; gives the result and the pauses, in seconds."""
    steps = exchange(CALL, retries or Retries(random=random.Random(0)))
    events, pauses = list(events), []
    step = next(steps)
    try:
        while True:
            if isinstance(step, Pause):
                pauses.append(step.seconds)
                step = steps.send(None)
                continue
            assert step is CALL
            event = events.pop(0)
            if isinstance(event, Exception):
                step = steps.throw(event)
            else:
                step = steps.send(response(event))
    except StopIteration as end:
        return end.value, pauses


@pytest.mark.parametrize(
    "failure",
    [
        *(moody.problem(status, "busy") for status in (429, 502, 503, 504)),
        (503, {"Content-Type": "text/html"}, b"<h1>a proxy</h1>"),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut"),
    ],
    ids=repr,
)
def test_what_may_pass_is_asked_again(failure):
    answer, pauses = drive([failure, failure, moody.ok({"fine": 1})])
    assert answer.json() == {"fine": 1}
    assert len(pauses) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 406, 408, 413, 415, 422, 500, 302])
def test_what_would_fail_again_is_not_asked_again(status):
    with pytest.raises(ProblemError) as caught:
        drive([moody.problem(status, "some-code")])
    assert (caught.value.status, caught.value.code) == (status, "some-code")


def test_pauses_double_up_to_the_longest_and_are_drawn():
    _, pauses = drive(
        [moody.problem(503, "not-ready")] * 9 + [moody.ok({})],
        Retries(first_pause_s=1, longest_pause_s=16, random=random.Random(1)),
    )
    for pause, longest in zip(pauses, [1, 2, 4, 8, 16, 16, 16, 16, 16], strict=True):
        assert longest / 2 <= pause <= longest
    assert len({pause % 1 for pause in pauses}) == 9


def test_retry_after_is_waited_for_in_full_and_the_drawn_pause_comes_on_top():
    _, pauses = drive([moody.problem(429, "overloaded", Retry_After="12"), moody.ok({})])
    assert 12.05 <= pauses[0] <= 12.1


def test_it_gives_up_at_once_when_it_is_told_to_come_back_too_late():
    with pytest.raises(
        ServiceUnavailableError, match=r"It asks to come back after 120 s; tries: 1"
    ):
        drive([moody.problem(503, "draining", Retry_After="120")])


def test_it_gives_up_with_the_last_reason_and_what_to_do():
    with pytest.raises(
        ServiceUnavailableError,
        match=r"does not answer: refused\. See that it runs .*; tries: 1\.",
    ) as caught:
        drive([httpx.ConnectError("refused")], Retries(total_s=0))
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


def test_an_answer_that_cannot_be_decoded_is_not_asked_for_again():
    with pytest.raises(BadAnswerError, match="cannot be read: bad gzip"):
        drive([httpx.DecodingError("bad gzip")])


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "-7"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "9" * 400}, None),
        ({"Retry-After": formatdate(1030, usegmt=True), "Date": formatdate(1000, usegmt=True)}, 30),
        ({"Retry-After": formatdate(900, usegmt=True), "Date": formatdate(1000, usegmt=True)}, 0),
        ({"Retry-After": formatdate(0, usegmt=True)}, 0),
    ],
)
def test_retry_after_is_read_as_seconds_and_as_a_date(headers, seconds):
    assert retry_after(httpx.Headers(headers)) == seconds


@pytest.mark.parametrize("times", [{"total_s": -1}, {"first_pause_s": float("nan")}])
def test_times_that_are_none_are_refused(times):
    with pytest.raises(ConfigError, match="times of 0 s or more"):
        Retries(**times)
