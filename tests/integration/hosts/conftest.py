"""Fixtures of tests on several hosts."""

import pytest

from tests.integration.hosts import network


@pytest.fixture(scope="session")
def hosts_are_possible():
    """Skip, with the reason, where there can be no hosts."""
    if reason := network.why_there_are_none():
        pytest.skip(reason)
