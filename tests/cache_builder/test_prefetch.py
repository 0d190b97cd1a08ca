"""Items are made ahead, in order, and nothing is left running."""

import threading
import time

import pytest

from cache_builder.prefetch import map_ahead, read_ahead


def names_of_threads():
    return [thread.name for thread in threading.enumerate()]


def test_items_come_in_order():
    assert list(read_ahead(range(100), 3)) == list(range(100))
    assert list(read_ahead([], 1)) == []
    assert list(read_ahead([None, 0], 1)) == [None, 0]


def test_no_more_than_a_few_are_made_ahead():
    made = []
    items = read_ahead((made.append(n) or n for n in range(100)), 2)
    next(items)
    time.sleep(0.3)
    assert len(made) <= 5
    items.close()
    assert "read-ahead" not in names_of_threads()


def test_making_and_using_overlap():
    begun = [threading.Event() for _ in range(5)]

    def items():
        for n in range(5):
            begun[n].set()
            yield n

    for n in read_ahead(items(), 2):
        assert n == 4 or begun[n + 1].wait(60)


def test_what_making_raises_is_raised_where_the_items_are_used():
    def failing():
        yield 1
        raise OSError("the disk is gone")

    items = read_ahead(failing(), 2)
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    assert "read-ahead" not in names_of_threads()


def test_items_are_mapped_a_few_at_once_and_come_in_order():
    at_work, most = [], []
    three = threading.Barrier(3)

    def slow(n):
        at_work.append(n)
        most.append(len(at_work))
        if n < 3:
            three.wait(60)
        time.sleep(0.02 if n % 2 else 0.001)
        at_work.remove(n)
        return n * n

    assert list(map_ahead(slow, range(20), 3)) == [n * n for n in range(20)]
    assert max(most) == 3


def test_what_the_function_raises_is_raised_in_the_items_turn_and_nothing_more_is_begun():
    begun = []

    def failing(n):
        begun.append(n)
        if n == 2:
            raise OSError("the line is gone")
        return n

    mapped = map_ahead(failing, range(1000), 2)
    assert [next(mapped), next(mapped)] == [0, 1]
    with pytest.raises(OSError, match="the line is gone"):
        next(mapped)
    assert len(begun) < 10
    assert not [name for name in names_of_threads() if name.startswith("map-ahead")]
