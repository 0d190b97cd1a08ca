"""The time of one request, and clients that go away, in an event loop of the test."""

import asyncio
import contextlib

import pytest
from starlette.requests import ClientDisconnect, Request

from tests.tokenizers_svc.support import check_problem, jpeg, post
from tokenizers_svc.exchange import HANG_UP, Exchange, HangUp
from tokenizers_svc.limits import Limits
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.request_fields import field_of

LIMITS = Limits(body_timeout_s=0.05, request_deadline_s=0.2)


class Client:
    """A request whose client hangs up when told, behind a server that calls or does not."""

    def __init__(self, *, is_told):
        self.hang_up = HangUp()
        self._has_gone = asyncio.Event()
        scope = {"type": "http", "headers": []}
        if is_told:
            scope["extensions"] = {HANG_UP: self.hang_up}
        self.request = Request(scope, self._receive)

    async def _receive(self):
        await self._has_gone.wait()
        return {"type": "http.disconnect"}

    def leave(self):
        self._has_gone.set()
        self.hang_up.tell()


async def give(value):
    return value


async def outlast(log):
    try:
        await asyncio.sleep(60)
    finally:
        log.append("stopped")


@pytest.mark.parametrize("is_told", [True, False])
def test_work_for_a_client_that_has_gone_is_cancelled(is_told):
    log = []

    async def scenario():
        client = Client(is_told=is_told)
        asyncio.get_running_loop().call_later(0.01, client.leave)
        async with Exchange(client.request, LIMITS) as exchange:
            assert await exchange.read(give(1)) == 1
            await exchange.work(outlast(log))

    with pytest.raises(ClientDisconnect):
        asyncio.run(scenario())
    assert log == ["stopped"]


def test_work_for_a_client_that_went_while_its_body_was_read_is_cancelled():
    async def scenario():
        client = Client(is_told=True)
        async with Exchange(client.request, LIMITS) as exchange:
            await exchange.read(give(1))
            client.leave()
            await exchange.work(asyncio.sleep(60))

    with pytest.raises(ClientDisconnect):
        asyncio.run(scenario())


@pytest.mark.parametrize("is_told", [True, False])
def test_a_client_that_goes_after_the_work_changes_nothing(is_told):
    async def scenario():
        client = Client(is_told=is_told)
        async with Exchange(client.request, LIMITS) as exchange:
            await exchange.read(give(1))
            answer = await exchange.work(give(2))
            client.leave()
            await asyncio.sleep(0.01)
        return answer, len(asyncio.all_tasks())

    assert asyncio.run(scenario()) == (2, 1)


def test_the_body_has_its_own_time_and_the_work_the_rest():
    async def scenario(reading, work):
        async with Exchange(Client(is_told=True).request, LIMITS) as exchange:
            await exchange.read(asyncio.sleep(reading))
            await exchange.work(asyncio.sleep(work))
        return exchange.read_s

    with pytest.raises(ProblemError) as late:
        asyncio.run(scenario(60, 0))
    assert (late.value.code, late.value.limit) == ("body-timeout", 0.05)
    with pytest.raises(ProblemError) as late:
        asyncio.run(scenario(0, 60))
    assert (late.value.code, late.value.limit) == ("deadline", 0.2)
    assert asyncio.run(scenario(0.01, 0.1)) >= 0.009


def test_a_deadline_before_the_time_of_the_body_is_the_reason_that_is_told():
    async def scenario():
        request = Client(is_told=True).request
        request.scope["headers"] = [(b"x-request-timeout", b"0.01")]
        async with Exchange(request, LIMITS) as exchange:
            await exchange.read(asyncio.sleep(60))

    with pytest.raises(ProblemError) as late:
        asyncio.run(scenario())
    assert (late.value.code, late.value.limit) == ("deadline", 0.01)


def test_an_error_of_the_work_is_not_taken_for_a_lack_of_time():
    async def fail():
        raise TimeoutError("of a disk")

    async def scenario():
        async with Exchange(Client(is_told=True).request, LIMITS) as exchange:
            await exchange.work(fail())

    with pytest.raises(TimeoutError, match="of a disk"):
        asyncio.run(scenario())


def test_who_is_cancelled_from_outside_is_cancelled():
    async def scenario():
        async def serve():
            async with Exchange(Client(is_told=True).request, LIMITS) as exchange:
                await exchange.work(asyncio.sleep(60))

        serving = asyncio.create_task(serve())
        await asyncio.sleep(0.01)
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        return serving.cancelled()

    assert asyncio.run(scenario())


def test_of_two_fields_of_one_name_the_first_counts():
    scope = {"headers": [(b"accept", b"one"), (b"accept", b"two"), (b"x", b"\xe9")]}
    assert field_of(scope, b"accept") == "one"
    assert field_of(scope, b"x") == "\xe9"
    assert field_of(scope, b"nothing") is None
    assert field_of(scope, b"nothing", "default") == "default"


def test_the_first_accept_decides(client):
    headers = [("Accept", "application/x-npy"), ("Accept", "text/html")]
    assert post(client, jpeg(), headers=headers).headers["Content-Type"] == "application/x-npy"
    check_problem(post(client, jpeg(), headers=headers[::-1]), 406, "not-acceptable")
