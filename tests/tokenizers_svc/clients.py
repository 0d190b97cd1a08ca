"""The two clients behind one face, so that a test of one is a test of the other."""

import asyncio
import contextlib
import inspect

from tests.tokenizers_svc.moody import MoodyServer
from tokenizers_svc.client import AsyncTokenizerClient, Retries, TokenizerClient

QUICK = Retries(total_s=20, first_pause_s=0.001, longest_pause_s=0.01)
NO_RETRIES = Retries(total_s=0)


class WaitingAsyncClient:
    """An `AsyncTokenizerClient` whose every call is waited for."""

    def __init__(self, url, **options):
        self._runner = asyncio.Runner()
        self._client = AsyncTokenizerClient(url, **options)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._runner.run(self._client.close())
        self._runner.close()

    def __getattr__(self, name):
        method = getattr(self._client, name)

        def call(*args, **options):
            found = method(*args, **options)
            if inspect.isasyncgen(found):
                return self._iterate(found)
            return self._runner.run(found)

        return call

    def _iterate(self, items):
        try:
            while True:
                try:
                    yield self._runner.run(anext(items))
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(items.aclose())


KINDS = {"sync": TokenizerClient, "async": WaitingAsyncClient}


def connect(kind, url, *, retries=QUICK, **options):
    return KINDS[kind](url, retries=retries, timeout_s=20, **options)


@contextlib.contextmanager
def meeting(kind, *script, models=None, **options):
    """A moody server and a client of it."""
    with (
        MoodyServer(*script, models=models) as server,
        connect(kind, server.url, **options) as client,
    ):
        yield server, client
