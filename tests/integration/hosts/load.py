"""Clients that keep a service busy and compare every answer with what is right."""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from tests import factories
from tests.integration import builds
from tokenizers_svc.client import Retries, TokenizerClient

_PAUSE_S = 0.01  # of a client between two requests: what is being started needs the machine too


class Question(NamedTuple):
    """A picture and its token ids."""

    picture: bytes
    token_ids: Any


def questions(count: int) -> list[Question]:
    """Return pictures in known colours, all different."""
    ids = [factories.random_ids(seed) for seed in range(count)]
    return [Question(factories.encode(factories.draw_patches(each)), each) for each in ids]


class Load:
    """Several clients in threads of their own, each with one request after another."""

    def __init__(self, url: str, key: str, asked: Sequence[Question], num_clients: int = 4) -> None:
        self._url, self._key = url, key
        self._asked = asked
        self._ended = threading.Event()
        self._counts = [0] * num_clients
        self.failures: list[str] = []
        self._threads = [
            threading.Thread(target=self._ask, args=(number,)) for number in range(num_clients)
        ]

    @property
    def num_answers(self) -> int:
        """Right answers so far."""
        return sum(self._counts)

    def wait_for_more(self, count: int) -> None:
        """Wait until there are so many more answers, or something is wrong."""
        before = self.num_answers
        builds.wait_for(lambda: self.num_answers >= before + count or bool(self.failures))
        assert not self.failures

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, client_number: int) -> None:
        turn = client_number
        try:
            retries = Retries(total_s=builds.TIMEOUT_S)
            with TokenizerClient(self._url, key=self._key, retries=retries) as client:
                while not self._ended.wait(_PAUSE_S):
                    picture, expected = self._asked[turn % len(self._asked)]
                    found = client.tokenize(picture).ids
                    assert np.array_equal(found, expected), f"{turn}: {found} is not {expected}"
                    self._counts[client_number] += 1
                    turn += len(self._threads)
        except BaseException as exc:  # noqa: BLE001 - the test that waits for answers tells
            self.failures.append(repr(exc))
