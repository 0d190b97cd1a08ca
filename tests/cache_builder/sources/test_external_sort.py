"""Rows that do not fit into memory are sorted on disk, to the same order."""

import random

import pytest

from cache_builder.sources.external_sort import SortedRows, Spool


@pytest.mark.parametrize("max_in_memory", [1, 2, 7, 1000, 10_000])
def test_rows_come_sorted_by_their_first_item_however_few_fit_into_memory(max_in_memory):
    rng = random.Random(0)
    rows = [(f"{rng.randrange(10**6):06d}", i, None, {"x": [1.5]}) for i in range(1000)]
    found = SortedRows(iter(rows), max_in_memory=max_in_memory)
    assert len(found) == 1000
    assert list(found) == sorted(rows, key=lambda row: row[0])
    assert list(found) == list(found)


def test_runs_are_merged_to_longer_runs_so_that_few_files_are_open():
    rows = [(f"{i * 7919 % 10_007:05d}",) for i in range(10_007)]
    found = SortedRows(rows, max_in_memory=2)
    assert list(found) == sorted(rows)
    assert sum(len(level) for level in found._levels) < 3 * 64


def test_a_spool_is_read_by_several_at_once():
    spool = Spool()
    for i in range(5):
        spool.append((i, "x" * i))
    assert [(a, b[0]) for (a, _), b in zip(spool, spool, strict=True)] == [(i, i) for i in range(5)]
