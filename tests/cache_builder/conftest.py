"""Fixtures that several tests of the builder share."""

import pytest

from tests import factories


@pytest.fixture
def photos_dir(tmp_path):
    """Five drawn photographs in two classes."""
    return factories.write_folder(tmp_path / "images", factories.photo_images(5))
