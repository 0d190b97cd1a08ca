"""The images of a unit, whatever they lie in."""

from collections.abc import Iterator

from cache_builder.errors import ConfigError, ImageError
from cache_builder.formats.plan import PlanRow, PlanUnit
from cache_builder.prefetch import map_ahead
from cache_builder.sources import parquet, webdataset, zips
from cache_builder.sources.containers import Container, open_inflated
from cache_builder.sources.files import read_files
from cache_builder.sources.names import container_kind

_RANGES_AT_ONCE = 8  # of a remote container


def read_unit(root: str, unit: PlanUnit) -> Iterator[tuple[PlanRow, bytes | ImageError]]:
    """Yield every row of a unit with its image, or with why it is refused, in order.

    Args:
        root: Folder of files; of containers, which the unit names, of no use.
        unit: As it was planned, or some of its rows.

    Raises:
        SourceError: An image that was listed cannot be read.
    """
    if not unit.container:
        yield from read_files(root, unit)
        return
    wanted = sum(row.span[1] for row in unit.rows if row.span)
    with open_inflated(unit.container, unit.container_bytes, wanted_bytes=wanted) as container:
        if container_kind(unit.container) == "parquet":
            yield from parquet.read_rows(container, unit.rows)
            return

        def read(row: PlanRow) -> bytes | ImageError:
            return read_row(container, row)

        images = (
            map_ahead(read, unit.rows, _RANGES_AT_ONCE)
            if container.is_remote
            else (map(read, unit.rows))
        )
        yield from zip(unit.rows, images, strict=True)


def read_row(container: Container, row: PlanRow) -> bytes | ImageError:
    """Read one image out of a container, or say why it is refused.

    Raises:
        SourceError: It is not there any more.
    """
    if row.refused:
        return ImageError(row.refused)
    kind = container_kind(container.location)
    try:
        if kind == "webdataset":
            return webdataset.read_member(container, row)
        if kind == "zip":
            return zips.read_member(container, row)
    except ImageError as exc:
        return exc
    if kind == "parquet":
        return next(image for _, image in parquet.read_rows(container, [row]))
    raise ConfigError(
        f"{container.location} is neither a tar nor a zip nor a Parquet file, and a plan says that "
        "images lie in it. Run `patchcache verify` on the cache."
    )


def image_bytes(image: bytes | ImageError) -> bytes:
    """Return an image, or raise why there is none.

    Raises:
        ImageError: It was refused.
    """
    if isinstance(image, ImageError):
        raise image
    return image
