"""The threads of a worker serve its units in order, the older one first."""

import threading

import pytest

from cache_builder.decoders import Decoders
from cache_builder.errors import ImageError


def test_results_come_in_order_and_several_threads_work_at_once():
    together = threading.Barrier(3)

    def square(n):
        together.wait(timeout=60)  # three at once, or this breaks
        return n * n

    assert list(Decoders(3).map(square, range(9), 2)) == [n * n for n in range(9)]


def test_what_waits_of_an_older_unit_is_done_before_a_younger_one():
    decoders, begun, gate, done = Decoders(1), threading.Event(), threading.Event(), []

    def hold():
        begun.set()
        assert gate.wait(60)

    decoders.submit(1, hold)
    assert begun.wait(60)
    names = [(2, "younger 0"), (2, "younger 1"), (1, "older 0"), (3, "youngest"), (1, "older 1")]
    futures = [decoders.submit(rank, lambda name=name: done.append(name)) for rank, name in names]
    assert futures[1].cancel()
    gate.set()
    for future in futures[::2] + futures[3:4]:
        future.result(60)
    assert done == ["older 0", "older 1", "younger 0", "youngest"]


def test_an_error_is_raised_in_its_turn_and_the_threads_work_on():
    decoders = Decoders(2)

    def decode(n):
        if n == 2:
            raise ImageError("the file is empty")
        return n

    mapped = decoders.map(decode, range(100), 1)
    assert [next(mapped), next(mapped)] == [0, 1]
    with pytest.raises(ImageError, match="the file is empty"):
        next(mapped)
    assert list(decoders.map(decode, range(10, 15), 1)) == list(range(10, 15))
