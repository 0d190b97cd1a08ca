"""The client at a server that refuses, breaks off and talks rubbish."""

import threading

import msgpack
import numpy as np
import pytest

from cache_builder.errors import ConfigError, ImageError, TokenizerMismatchError
from tests.tokenizers_svc import moody
from tests.tokenizers_svc.clients import NO_RETRIES, connect, meeting
from tokenizers_svc.client import BadAnswerError, ProblemError, ServiceUnavailableError

OTHER = "0" * 64


@pytest.fixture(params=["sync", "async"])
def kind(request):
    return request.param


def batch_of(request):
    return [item["image"] for item in msgpack.unpackb(request[3])["items"]]


def answer_batch(request, fingerprint=moody.FINGERPRINT):
    """Tokens of every picture, told by its only byte; X is a bad one."""
    items = []
    for i, body in enumerate(batch_of(request)):
        if body == b"X":
            error = {"code": "corrupt-image", "status": 422, "detail": "It is bad."}
            items.append({"index": i, "error": error})
        else:
            ids = np.arange(body[0], body[0] + 4, dtype="<u2").tobytes()
            items.append({"index": i, "token_ids": ids, "view": [0, 0, 4, 4, False]})
    fields = {"model": "m", "fingerprint": fingerprint, "shape": [2, 2], "items": items}
    return 200, {"Content-Type": "application/vnd.msgpack"}, msgpack.packb(fields)


def answer_any(request):
    """A batch or one picture."""
    if "/batch" in request[1]:
        return answer_batch(request)
    if request[3] == b"X":
        return moody.problem(422, "corrupt-image")
    return moody.ok(moody.tokens(request[3][0]))


def pictures(num_pictures):
    return [bytes([i]) for i in range(num_pictures)]


def first_ids(items):
    return [int(item.tokens.ids[0, 0]) for item in items]


@pytest.mark.parametrize(
    "mood",
    [
        moody.problem(429, "overloaded", Retry_After="0"),
        moody.problem(503, "not-ready"),
        (502, {"Content-Type": "text/html"}, b"<h1>a proxy</h1>"),
        moody.CUT,
        moody.RUBBISH,
    ],
    ids=["busy", "loading", "proxy", "cut", "rubbish"],
)
def test_a_bad_mood_passes(mood, kind):
    with meeting(kind, mood, mood, moody.ok(moody.tokens(3))) as (server, client):
        assert client.tokenize(b"picture").ids.tolist() == [[3, 4], [5, 6]]
    assert [request[3] for request in server.requests] == [b"picture"] * 3


@pytest.mark.parametrize("mood", [moody.problem(503, "draining"), moody.CUT, moody.RUBBISH])
def test_a_bad_mood_that_stays_is_told(mood, kind):
    with (
        meeting(kind, mood, retries=NO_RETRIES) as (_server, client),
        pytest.raises(ServiceUnavailableError, match="See that it runs"),
    ):
        client.tokenize(b"picture")


def test_a_port_where_nobody_listens_is_told(kind):
    with moody.nobody() as url, connect(kind, url, retries=NO_RETRIES) as client:
        with pytest.raises(ServiceUnavailableError, match="does not answer"):
            client.models()
        with pytest.raises(
            ServiceUnavailableError, match=r"not ready after 0\.01 s: .*(refused|failed)"
        ):
            client.wait_ready(0.01)


def test_it_waits_until_the_service_is_ready(kind):
    mood = moody.problem(503, "not-ready")
    with meeting(kind, mood, moody.CUT, moody.ok({"status": "ready"})) as (server, client):
        client.wait_ready(20)
    assert len(server.requests) == 3


def test_a_refusal_says_which_and_what_the_limit_is(kind):
    mood = moody.problem(413, "image-too-large", X_Request_Id="abc")
    with (
        meeting(kind, mood) as (_server, client),
        pytest.raises(ProblemError, match=r"It is image-too-large\. \(image-too-l") as caught,
    ):
        client.tokenize(b"picture")
    problem = caught.value
    assert (problem.code, problem.status, problem.limit) == ("image-too-large", 413, 7)
    assert problem.request_id == "abc"


def test_a_refusal_of_something_else_shows_what_it_says(kind):
    mood = 404, {"Content-Type": "text/html"}, b"<h1>Not\n here</h1>" + b"x" * 10_000
    with (
        meeting(kind, mood) as (_server, client),
        pytest.raises(ProblemError, match=r"HTTP 404 .*<h1>Not here</h1>x+'") as caught,
    ):
        client.tokenize(b"picture")
    assert caught.value.code == "http-404"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "mood",
    [
        (200, {"Content-Type": "text/html"}, b"<h1>hello</h1>"),
        (200, {"Content-Encoding": "gzip"}, b"no gzip"),
    ],
)
def test_an_answer_that_is_none_is_refused_and_not_asked_for_again(mood, kind):
    with (
        meeting(kind, mood) as (server, client),
        pytest.raises(BadAnswerError, match=server.url + "|cannot be read"),
    ):
        client.tokenize(b"picture")
    assert len(server.requests) == 1


@pytest.mark.parametrize("ordered", [True, False])
def test_many_pictures_are_sent_in_batches_and_come_back_in_order(ordered, kind):
    seen = []
    with meeting(kind, answer_any) as (server, client):
        items = list(
            client.tokenize_many(
                pictures(23),
                batch_size=5,
                concurrency=3,
                ordered=ordered,
                progress=lambda done, total: seen.append((done, total)),
            )
        )
    if not ordered:
        items.sort(key=lambda item: item.index)
    assert [item.index for item in items] == list(range(23))
    assert first_ids(items) == list(range(23))
    assert sorted(len(batch_of(r)) for r in server.requests[1:]) == [3, 5, 5, 5, 5]
    assert seen == [(n, 23) for n in range(1, 24)]


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({"max_items": 3}, [3, 3, 3, 1]),
        ({"max_queue": 8}, [4, 4, 2]),  # two requests at a time
        ({"max_batch_body_bytes": 450}, [2, 2, 2, 2, 2]),
    ],
)
def test_batches_keep_to_the_limits_of_the_service(limits, sizes, kind):
    with meeting(kind, answer_any, models=moody.models(**limits)) as (server, client):
        items = list(client.tokenize_many(pictures(10), concurrency=2))
    assert first_ids(items) == list(range(10))
    sent = [len(batch_of(r)) if "/batch" in r[1] else 1 for r in server.requests[1:]]
    assert sorted(sent) == sorted(sizes)


def test_views_travel_with_their_pictures(kind):
    with meeting(kind, answer_any) as (server, client):
        views = [None, (0, 1, 2, 3), (0, 1, 2, 3, True)]
        list(client.tokenize_many(iter(pictures(3)), views=views))
        sent = msgpack.unpackb(server.requests[1][3])["items"]
        assert [item["view"] for item in sent] == [None, [0, 1, 2, 3], [0, 1, 2, 3, 1]]
        with pytest.raises(ConfigError, match="one view for every picture"):
            list(client.tokenize_many(pictures(3), views=[None]))
        with pytest.raises(ConfigError, match="top, left, height, width"):
            list(client.tokenize_many(pictures(1), views=[(0.5, 1, 2, 3)]))


def test_one_bad_picture_costs_no_other_its_tokens(kind, tmp_path):
    given = [b"\1", b"X", b"\3", tmp_path / "missing.jpg", b"\5"]
    with meeting(kind, answer_any) as (_server, client):
        items = list(client.tokenize_many(given, on_error="return"))
        assert first_ids(items[::2]) == [1, 3, 5]
        assert isinstance(items[1].error, ProblemError)
        assert items[1].error.code == "corrupt-image"
        assert isinstance(items[3].error, ImageError)
        assert "missing.jpg cannot be read: No such file" in str(items[3].error)
        with pytest.raises(ProblemError, match="It is bad") as caught:
            list(client.tokenize_many(given))
    assert caught.value.__notes__ == ["of the picture at index 1"]


def test_a_batch_refused_as_a_whole_is_halved_until_the_bad_one_is_alone(kind):
    def refuse(request):
        if "/batch" not in request[1]:
            return answer_any(request)
        return moody.problem(413, "body-too-large") if b"X" in batch_of(request) else (
            answer_batch(request)
        )  # fmt: skip

    given = [*pictures(6), b"X", b"\7"]
    with meeting(kind, refuse) as (_server, client):
        items = list(client.tokenize_many(given, on_error="return"))
    assert [item.index for item in items if item.error] == [6]
    assert first_ids([item for item in items if not item.error]) == [0, 1, 2, 3, 4, 5, 7]


def test_a_picture_that_met_a_busy_moment_within_a_batch_is_asked_again(kind):
    def busy(request):
        status, headers, body = answer_batch(request)
        fields = msgpack.unpackb(body)
        error = {"code": "deadline", "status": 504, "detail": "Late."}
        fields["items"][1] = {"index": 1, "error": error}
        return status, headers, msgpack.packb(fields)

    with meeting(kind, busy, answer_any) as (_server, client):
        assert first_ids(client.tokenize_many(pictures(3))) == [0, 1, 2]


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_what_is_wrong_with_the_service_ends_it_all(on_error, kind):
    with (
        meeting(kind, moody.problem(401, "unauthorized")) as (_server, client),
        pytest.raises(ProblemError, match="unauthor"),
    ):
        list(client.tokenize_many(pictures(50), batch_size=2, on_error=on_error))


def test_a_tokenizer_that_changes_in_the_middle_is_noticed(kind):
    def changed(request):
        return answer_batch(request, OTHER)

    with meeting(kind, answer_batch, changed) as (_server, client):
        items = client.tokenize_many(pictures(6), batch_size=2, concurrency=1)
        assert first_ids([next(items), next(items)]) == [0, 1]
        with pytest.raises(TokenizerMismatchError, match=f"{OTHER}.*{moody.FINGERPRINT}"):
            next(items)


def test_another_tokenizer_than_expected_is_refused_before_a_picture_is_sent(kind):
    with (
        meeting(kind, answer_batch) as (server, client),
        pytest.raises(TokenizerMismatchError, match="are expected"),
    ):
        list(client.tokenize_many(pictures(6), expect_fingerprint=OTHER))
    assert len(server.requests) == 1


def test_one_picture_of_another_tokenizer_than_expected_is_refused(kind):
    with meeting(kind, moody.ok(moody.tokens())) as (_server, client):
        client.tokenize(b"picture", expect_fingerprint=moody.FINGERPRINT)
        with pytest.raises(TokenizerMismatchError):
            client.tokenize(b"picture", expect_fingerprint=OTHER)


def test_pictures_are_taken_no_further_ahead_than_two_batches_per_request(kind):
    taken = []
    endless = (taken.append(i) or bytes([i % 200]) for i in range(10**9))
    with meeting(kind, answer_any) as (_server, client):
        items = client.tokenize_many(endless, batch_size=2, concurrency=3)
        assert first_ids(next(items) for _ in range(20)) == list(range(20))
        items.close()
    assert len(taken) <= 20 + 2 * 2 * 3


def test_a_caller_who_leaves_does_not_wait_for_what_is_on_its_way():
    asked, may_answer = threading.Event(), threading.Event()

    def slow(request):
        if batch_of(request)[0] == b"\0":
            return answer_batch(request)
        asked.set()
        may_answer.wait(20)
        return moody.problem(503, "draining")

    with meeting("sync", slow) as (_server, client):
        items = client.tokenize_many(pictures(4), batch_size=2, concurrency=1)
        assert next(items).index == 0
        assert asked.wait(20)
        items.close()
        may_answer.set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "1 picture or more"),
        ({"concurrency": 0}, "concurrency is 1 to"),
        ({"model": "n"}, "no model 'n'. It has m"),
        ({"on_error": "ignore"}, "'raise' or 'return'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, message, kind):
    with meeting(kind, answer_any) as (_server, client):
        with pytest.raises(ConfigError, match=message):
            list(client.tokenize_many(pictures(1), **arguments))
        with pytest.raises(ConfigError, match="for `tokenize`"):
            list(client.tokenize_many(b"one picture"))


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://a", "http://", "http://a:b", 7])
def test_a_url_that_is_none_is_refused(url, kind):
    with pytest.raises(ConfigError, match="is not a URL"):
        connect(kind, url)


def test_a_url_with_a_password_is_refused_and_not_repeated(kind):
    with pytest.raises(ConfigError, match="Pass the key as `key`") as caught:
        connect(kind, "http://me:secret@127.0.0.1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "two words", "sécret", "line\n"])
def test_a_key_that_is_none_is_refused_and_not_repeated(key, kind):
    with pytest.raises(ConfigError, match="printable ASCII") as caught:
        connect(kind, "http://127.0.0.1", key=key)
    assert not key or key not in str(caught.value)


def test_the_key_travels_as_bearer_and_the_request_asks_for_msgpack(kind):
    with meeting(kind, moody.ok(moody.tokens()), key="abc", model="m") as (server, client):
        client.tokenize(b"picture", (0, 0, 4, 4, True), soft_top_k=2, soft_temperature=0.5)
    method, path, headers, _ = server.requests[0]
    assert (method, headers["Authorization"]) == ("POST", "Bearer abc")
    assert headers["Accept"].startswith("application/vnd.msgpack")
    assert path == ("/v1/tokenize?model=m&view=0%2C0%2C4%2C4%2C1&soft_top_k=2&soft_temperature=0.5")


@pytest.mark.parametrize("ids", [[], [[0.5]], [[-1]], [[65_536]], "text", [["a"]]])
def test_token_ids_that_are_none_are_refused_here(ids, kind):
    refused = pytest.raises(ConfigError, match="integers from 0 to 65,535")
    with moody.nobody() as url, connect(kind, url) as client, refused:
        client.detokenize(ids)
