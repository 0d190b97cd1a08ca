"""Who hears of requests, and when."""

import asyncio
import logging

from tokenizers_svc.observation import Audience, RequestRecord


def test_requests_are_told_of_in_one_go_in_the_order_in_which_they_ended():
    heard = []
    audience = Audience(heard.append)
    first, second = RequestRecord("GET"), RequestRecord("POST")

    async def scenario():
        audience.note(first)
        audience.note(second)
        assert not heard
        await asyncio.sleep(0.2)
        assert heard == [first, second]
        audience.note(first)
        await asyncio.sleep(0.2)
        assert heard == [first, second, first]

    asyncio.run(scenario())


def test_who_asks_hears_at_once_and_nothing_is_told_twice():
    heard = []

    async def scenario():
        audience = Audience(heard.append)
        audience.note(RequestRecord("GET"))
        audience.tell()
        assert len(heard) == 1
        await asyncio.sleep(0.2)

    asyncio.run(scenario())
    assert len(heard) == 1


def test_an_observer_hears_of_what_ended_after_it_joined():
    early, late = [], []

    async def scenario():
        audience = Audience(early.append)
        audience.note(RequestRecord("GET"))
        audience.add(late.append)
        audience.note(RequestRecord("POST"))
        audience.tell()

    asyncio.run(scenario())
    assert [record.method for record in early] == ["GET", "POST"]
    assert [record.method for record in late] == ["POST"]


def test_an_observer_that_fails_keeps_nothing_from_the_others(caplog):
    heard = []

    def fail(record):
        raise ZeroDivisionError

    async def scenario():
        audience = Audience(fail, heard.append)
        audience.note(RequestRecord("GET"))
        audience.note(RequestRecord("POST"))
        audience.tell()

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    assert len(heard) == 2
    assert len(caplog.records) == 2
