"""Every test here runs on the CPU, and once more on a GPU where there is one."""

import pytest

SLOW = {"test_compiled_blocks_have_the_names_and_losses_of_the_others"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the code under test computes."""
    return request.param


def pytest_collection_modifyitems(items):
    for item in items:
        if item.originalname in SLOW:
            item.add_marker(pytest.mark.slow)
