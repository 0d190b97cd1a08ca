"""A node that is too slow to start is started again, and nothing else is."""

import pytest

from cache_builder.ray_cluster import start_patiently

TOO_SLOW = "The current node timed out during startup. This could happen because"


class Starts:
    """A node that fails with these messages before it starts."""

    def __init__(self, *failures):
        self.left = list(failures)
        self.num_cleaned = 0

    def start(self):
        if self.left:
            raise Exception(self.left.pop(0))  # noqa: TRY002  Ray's is no narrower
        return "a node"

    def clean_up(self):
        self.num_cleaned += 1


def test_a_node_that_was_too_slow_is_started_again():
    starts = Starts(TOO_SLOW, TOO_SLOW)
    assert start_patiently(starts.start, starts.clean_up) == "a node"
    assert starts.num_cleaned == 2


def test_a_node_that_is_too_slow_every_time_says_what_to_do():
    starts = Starts(TOO_SLOW, TOO_SLOW, TOO_SLOW, TOO_SLOW)
    with pytest.raises(RuntimeError, match=r"not started in time, 3 times.*with --workers 0"):
        start_patiently(starts.start, starts.clean_up)
    assert (starts.num_cleaned, len(starts.left)) == (3, 1)


def test_what_else_is_wrong_with_a_node_is_not_tried_again():
    starts = Starts("No such resource", TOO_SLOW)
    with pytest.raises(Exception, match="No such resource"):
        start_patiently(starts.start, starts.clean_up)
    assert (starts.num_cleaned, len(starts.left)) == (0, 1)
