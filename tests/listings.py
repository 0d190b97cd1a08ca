"""What the tests of sources ask of a source."""

from cache_builder.errors import ImageError
from cache_builder.sources import open_source
from tests import factories


def listed(location, unit_size=None):
    return open_source(str(location)).scan(unit_size)


def rows_of(listing):
    return [row for unit in listing.units for row in unit.rows]


def read_all(location, unit_size=None):
    """Return image by key, of refused ones the reason."""
    source = open_source(str(location))
    return {
        row.key: str(image) if isinstance(image, ImageError) else image
        for unit in source.scan(unit_size).units
        for row, image in source.read(unit)
    }


def folder(root, *names):
    """Write files that hold their own names."""
    return factories.write_folder(root, {name: name.encode() for name in names})
