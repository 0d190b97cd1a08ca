"""The sample depends on the seed and the keys, and on nothing else."""

from cache_builder.sampling import held_out_keys, smallest

KEYS = [f"class{number % 7}/image{number}" for number in range(1000)]


def test_one_key_in_twenty_is_held_out_whatever_the_order():
    held_out = held_out_keys(KEYS, seed=3)
    assert len(held_out) == 50
    assert held_out_keys(KEYS[::-1], seed=3) == held_out
    assert held_out_keys(KEYS, seed=4) != held_out
    assert held_out_keys(KEYS[:19], seed=3) == frozenset()


def test_the_smallest_of_parts_are_the_smallest_of_the_whole():
    whole = smallest(KEYS, 100, seed=0)
    for size in (1, 7, 400):
        merged: list[str] = []
        for start in range(0, len(KEYS), size):
            merged = smallest([*merged, *KEYS[start : start + size]], 100, seed=0)
        assert merged == whole
