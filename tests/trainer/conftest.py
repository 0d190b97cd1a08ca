"""Small caches that the tests of the trainer read."""

import pytest

from tests.trainer.caches import make_cache, make_residual_cache


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory):
    """A cache of 24 pictures of 4 x 4 coloured patches and a codebook of the six colours.

    It has soft targets: three ids per patch.
    """
    return make_cache(tmp_path_factory.mktemp("tiny"), soft_top_k=3, soft_temperature=1.0)


@pytest.fixture(scope="session")
def residual_cache(tmp_path_factory):
    """A cache of four such pictures with two token ids per patch."""
    return make_residual_cache(tmp_path_factory.mktemp("residual"))
