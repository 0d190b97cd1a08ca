"""Fixtures of tests that cross packages: small builds that are written once."""

import gc

import pytest

from tests.integration import builds


@pytest.fixture(autouse=True)
def no_garbage_for_other_tests():
    """What killed clients leave in this process warns in the test that caused it."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder of small pictures, some broken, and two codebooks."""
    folder = tmp_path_factory.mktemp("inputs")
    return builds.write_images(folder / "images"), builds.write_codebooks(folder)


@pytest.fixture(scope="session")
def undisturbed(inputs, tmp_path_factory):
    """Return the files of a build of two tokenizers that nothing disturbed, by layout."""
    images, codebooks = inputs
    made = {}

    def build(layout):
        if layout not in made:
            out = tmp_path_factory.mktemp("undisturbed") / layout
            builds.build_here(builds.options_of(images, codebooks, out, layout=layout))
            made[layout] = builds.contents(out)
        return made[layout]

    return build
