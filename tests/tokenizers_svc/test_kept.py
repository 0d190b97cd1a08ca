"""Answers that are kept: by content, in bounded memory, once for all who ask at once."""

import asyncio
import contextlib
import hashlib

import pytest

from cache_builder.formats.views import View
from tests.tokenizers_svc.sending import FORMS, read_ids, send, send_batch
from tests.tokenizers_svc.support import check_problem, expected_ids, jpeg, post
from tokenizers_svc.kept import KeptAnswers
from tokenizers_svc.tokens import ImageFacts, Key, Outcome, Tokens

VIEW = View(0, 0, 5, 5, hflip=False)


def key(name):
    return Key(name, "f" * 64, None, None)


def outcome(name, num_bytes=100):
    return Outcome(Tokens(bytes(num_bytes), VIEW, ImageFacts(5, 5, "PNG")), None)


async def at_once(name, num_bytes=100):
    return outcome(name, num_bytes)


def is_a_hit(answer):
    return "cache;desc=hit" in answer.headers["server-timing"]


def test_a_picture_that_comes_again_is_answered_from_memory(zoo):
    body = jpeg(seed=61)
    first, second = post(zoo, body), send(zoo, "json", body)
    assert not is_a_hit(first)
    assert is_a_hit(second)
    assert "x-batch-size" not in second.headers
    assert first.json() == second.json()
    assert first.headers["etag"] == second.headers["etag"]
    items = send_batch(zoo, "msgpack", [body, body])
    assert is_a_hit(items)


def test_another_view_model_or_softness_is_another_answer(zoo):
    body = jpeg(seed=62)
    post(zoo, body)
    for params in ({"view": "0,0,9,9"}, {"model": "cosine"}, {"soft_top_k": 2}):
        answer = post(zoo, body, params=params)
        assert not is_a_hit(answer)
        assert is_a_hit(post(zoo, body, params=params))
    assert not is_a_hit(post(zoo, body + b"\0"))


def test_tokens_are_found_by_the_hash_of_the_file_without_sending_it(zoo):
    body = jpeg(seed=63)
    path = f"/v1/tokens/{hashlib.sha256(body).hexdigest()}"
    check_problem(zoo.get(path), 404, "not-found")
    sent = post(zoo, body)
    found = zoo.get(path)
    assert found.json() == sent.json()
    assert found.headers["etag"] == sent.headers["etag"]
    for form, accept in FORMS.items():
        answer = zoo.get(path, headers={"Accept": accept})
        assert read_ids(answer).flatten().tolist() == expected_ids(body)
        assert answer.headers["etag"].endswith(f'-{form}"')
    known = zoo.get(path, headers={"If-None-Match": sent.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")
    check_problem(zoo.get(path, params={"view": "0,0,9,9"}), 404, "not-found")
    check_problem(zoo.get(path, params={"model": "residual"}), 404, "not-found")
    check_problem(zoo.get(path, headers={"Accept": "text/html"}), 406, "not-acceptable")


@pytest.mark.parametrize("digest", ["abc", "g" * 64, "A" * 64])
def test_what_is_no_hash_is_refused(zoo, digest):
    check_problem(zoo.get(f"/v1/tokens/{digest}"), 400, "bad-request")


def test_a_service_that_keeps_nothing_finds_nothing(small):
    body = jpeg(seed=64)
    assert not is_a_hit(post(small, body))
    assert not is_a_hit(post(small, body))
    check_problem(small.get(f"/v1/tokens/{hashlib.sha256(body).hexdigest()}"), 404, "not-found")


def test_memory_is_bounded_and_what_was_not_used_for_longest_goes_first():
    async def scenario():
        kept = KeptAnswers(3500)  # three answers of 1000 bytes
        for name in ("a", "b", "c"):
            await kept.get(key(name), lambda name=name: at_once(name))
        kept.find(key("a"))
        await kept.get(key("d"), lambda: at_once("d"))
        assert [name for name in "abcd" if kept.find(key(name))] == ["a", "c", "d"]
        assert kept.num_bytes <= 3500
        await kept.get(key("huge"), lambda: at_once("huge", 5000))
        assert kept.find(key("huge")) is None
        assert len(kept) == 3

    asyncio.run(scenario())


class Slow:
    """Work that is counted, and done when it may be."""

    def __init__(self):
        self.num_begun = self.num_cancelled = 0
        self.may_end = asyncio.Event()

    async def __call__(self):
        self.num_begun += 1
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return outcome("a")


def test_equal_pictures_that_are_asked_for_at_once_are_tokenised_once():
    async def scenario():
        kept, work = KeptAnswers(10_000), Slow()
        asking = [asyncio.ensure_future(kept.get(key("a"), work)) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking[0].cancel()  # the one that began it
        await asyncio.sleep(0)
        work.may_end.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert answers[1:] == [outcome("a")] * 4
        assert (work.num_begun, work.num_cancelled) == (1, 0)

    asyncio.run(scenario())


def test_work_that_nobody_waits_for_any_more_ends_and_can_begin_again():
    async def scenario():
        kept, work = KeptAnswers(10_000), Slow()
        asking = [asyncio.ensure_future(kept.get(key("a"), work)) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for one in asking:
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking[1]
        again = asyncio.ensure_future(kept.get(key("a"), work))
        work.may_end.set()
        assert await again == outcome("a")
        assert (work.num_begun, work.num_cancelled) == (2, 1)

    asyncio.run(scenario())


def test_a_failure_reaches_all_who_wait_and_is_not_kept():
    async def scenario():
        kept = KeptAnswers(10_000)

        async def fail():
            await asyncio.sleep(0)
            raise ValueError("no")

        asking = [asyncio.ensure_future(kept.get(key("a"), fail)) for _ in range(3)]
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert [str(answer) for answer in answers] == ["no"] * 3
        assert await kept.get(key("a"), lambda: at_once("a")) == outcome("a")

    asyncio.run(scenario())
