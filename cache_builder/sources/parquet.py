"""Image data sets in Parquet files, as Hugging Face stores them: the only `import pyarrow`.

The image column is a struct of `bytes` and `path`, or plain binary. The label column is `label`, or
the one that the schema calls a ClassLabel; its class names come from the schema too. Further
columns of text, numbers and truth values travel along.

A key is the file's name without its extension and the number of the row. One file is one unit, or,
where it is large, groups of rows are: a reader decodes whole row groups, a few rows at a time.
"""

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from cache_builder.errors import ConfigError, ImageError, MissingDependencyError, SourceError
from cache_builder.formats.headers import shorten
from cache_builder.formats.keys import escape_key
from cache_builder.formats.plan import PlanRow
from cache_builder.prefetch import map_ahead
from cache_builder.sources.classes import ValueClasses
from cache_builder.sources.columns import clean_json
from cache_builder.sources.containers import Container, ContainerFile, open_container, unreadable
from cache_builder.sources.listing import MAX_UNIT_SIZE, Listing, Part, Row, list_parts
from cache_builder.sources.names import base_name, is_remote, printable, size_problem

logger = logging.getLogger(__name__)

_FILES_AT_ONCE = 4  # of remote ones
_ROWS_PER_LISTING = 8192
_ROWS_PER_READ = 16
_BUFFER_BYTES = 4 << 20  # without it a whole column of a row group would be held
_IMAGE_NAMES = ("image", "img", "jpg", "png", "pixel_values")


class _Columns(NamedTuple):
    """What the columns of a file are."""

    image: str
    is_struct: bool
    label: str | None
    class_names: tuple[str, ...]
    extra: tuple[str, ...]
    left_out: tuple[str, ...]


def scan_parquet(location: str, paths: list[str], unit_size: int | None) -> Listing:
    """Read every column but the images.

    Raises:
        SourceError: A file is damaged, or has no column of images.
        ConfigError: The files have class names that differ.
    """
    with open_container(paths[0]) as first, _opened(first) as file:
        columns = _columns(file, paths[0])
    if columns.left_out:
        logger.warning(
            "%s: columns %s hold neither text nor numbers and are left out",
            location, ", ".join(columns.left_out),
        )  # fmt: skip

    def scan(path: str) -> list[Part]:
        return list(_scan_file(path, columns, unit_size or MAX_UNIT_SIZE))

    remote = any(map(is_remote, paths))
    found = map_ahead(scan, paths, _FILES_AT_ONCE) if remote else map(scan, paths)
    parts = itertools.chain.from_iterable(found)
    listing = list_parts("parquet", location, parts, ValueClasses(columns.class_names))
    if not listing.info.num_samples:
        raise SourceError(f"{location}: no Parquet file holds a row. Name others.")
    return listing


def read_rows(
    container: Container, rows: Sequence[PlanRow]
) -> Iterator[tuple[PlanRow, bytes | ImageError]]:
    """Yield rows with their images; the rows are in the order of the file.

    Raises:
        SourceError: The file is damaged, or has changed since it was listed.
    """
    wanted = {_row_number(row): row for row in rows if not row.refused}
    with _opened(container) as file:
        columns = _columns(file, container.location)
        images = _images(file, columns, wanted, container.location)
        for row in rows:
            yield row, ImageError(row.refused) if row.refused else next(images)


def _images(
    file: Any, columns: _Columns, wanted: dict[int, PlanRow], location: str
) -> Iterator[bytes | ImageError]:
    column = f"{columns.image}.bytes" if columns.is_struct else columns.image
    start, num_found = 0, 0
    for group in range(file.metadata.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        if any(start <= number < stop for number in wanted):
            number = start
            for batch in _batches(file, _ROWS_PER_READ, [column], location, group):
                values = batch.column(0)
                if columns.is_struct:
                    values = values.field("bytes")
                for value in values:
                    if number in wanted:
                        num_found += 1
                        yield _image(value)
                    number += 1
        start = stop
    if num_found < len(wanted):
        raise SourceError(
            f"{location} has {start:,} rows, fewer than when it was listed. Restore it."
        )


def _image(value: Any) -> bytes | ImageError:
    buffer = value.as_buffer()
    if buffer is None:
        return ImageError("the row holds no image bytes")
    problem = size_problem(buffer.size)
    return ImageError(problem) if problem else buffer.to_pybytes()


def _scan_file(path: str, columns: _Columns, unit_size: int) -> Iterator[Part]:
    with open_container(path) as container, _opened(container) as file:
        here = _columns(file, path)
        if here != columns:
            raise ConfigError(
                f"{path} has other columns or class names than the first file. "
                "Pass the files of one data set."
            )
        stem = base_name(path).rpartition(".")[0]
        sizes = [
            file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)
        ]
        number = 0
        if sum(sizes) <= unit_size:
            groups_of_units = [list(range(len(sizes)))]
        else:
            groups_of_units = _grouped(sizes, unit_size)
        for groups in groups_of_units:
            rows = list(_rows(file, columns, groups, number, stem, path))
            number += len(rows)
            yield Part(path, container.num_bytes, rows)


def _grouped(sizes: list[int], unit_size: int) -> list[list[int]]:
    """Put row groups together until a unit would be too large; one that is too large is alone."""
    units: list[list[int]] = []
    num_rows = 0
    for group, size in enumerate(sizes):
        if not units or num_rows + size > unit_size:
            units.append([])
            num_rows = 0
        units[-1].append(group)
        num_rows += size
    return units


def _rows(
    file: Any, columns: _Columns, groups: list[int], first: int, stem: str, path: str
) -> Iterator[Row]:
    wanted = [*columns.extra]
    if columns.label:
        wanted.append(columns.label)
    if columns.is_struct:
        wanted.append(f"{columns.image}.path")
    number = first
    for group in groups:
        if not wanted:
            for _ in range(file.metadata.row_group(group).num_rows):
                yield Row(escape_key(f"{stem}/{number:09d}"), str(number))
                number += 1
            continue
        for batch in _batches(file, _ROWS_PER_LISTING, wanted, path, group):
            for fields in _fields_of(batch, path):
                image = fields.pop(columns.image, None) or {}
                label = fields.pop(columns.label, None) if columns.label else None
                name = image.get("path")
                source = str(number)
                if isinstance(name, str) and name:
                    source += f":{printable(name)}"
                extra = clean_json(fields)
                extra = {name: value for name, value in extra.items() if value is not None}
                yield Row(escape_key(f"{stem}/{number:09d}"), source, label, extra or None)
                number += 1


def _columns(file: Any, location: str) -> _Columns:
    """Say what the columns are, by the schema and by what Hugging Face wrote into it."""
    from pyarrow import types

    schema = file.schema_arrow
    features = _hugging_face_features(schema.metadata or {})
    binary = [field.name for field in schema if _is_binary(types, field.type)]
    structs = [field.name for field in schema if _is_image_struct(types, field.type)]
    said = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    candidates = [name for name in (*said, *_IMAGE_NAMES, *structs, *binary)
                  if name in structs or name in binary]  # fmt: skip
    if not candidates:
        raise SourceError(
            f"{location} has no column of images: a struct of `bytes` and `path`, or binary. "
            f"Its columns are {shorten(', '.join(schema.names))}. Name files that have one."
        )
    image = candidates[0]
    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    label = next((name for name in ("label", *classes) if name in schema.names), None)
    for name in (image, label):
        if schema.names.count(name) > 1:
            raise SourceError(f"{location} has two columns named {name!r}. Rename one of them.")
    if label and not _is_label(types, schema.field(label).type):
        label = None
    given = None
    if label and types.is_integer(schema.field(label).type):  # a column of text has its own names
        given = features.get(label, {}).get("names")
    extra = tuple(
        field.name
        for field in schema
        if field.name not in (image, label) and _is_scalar(types, field.type)
    )
    return _Columns(
        image=image,
        is_struct=image in structs,
        label=label,
        class_names=tuple(map(str, given)) if isinstance(given, list) else (),
        extra=extra,
        left_out=tuple(name for name in schema.names if name not in (image, label, *extra)),
    )


def _hugging_face_features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # other programs write Parquet too


def _is_image_struct(types: Any, kind: Any) -> bool:
    if not types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind}
    return "bytes" in fields and "path" in fields and _is_binary(types, fields["bytes"])


def _is_binary(types: Any, kind: Any) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_label(types: Any, kind: Any) -> bool:
    return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))


def _is_scalar(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_boolean(kind) or types.is_floating(kind) or _is_label(types, kind))


def _batches(
    file: Any, batch_size: int, columns: list[str], location: str, group: int
) -> Iterator[Any]:
    import pyarrow

    try:
        yield from file.iter_batches(batch_size, row_groups=[group], columns=columns)
    except (pyarrow.ArrowException, OSError, ValueError) as exc:
        raise _damaged(location, exc) from exc


def _fields_of(batch: Any, location: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except ValueError as exc:  # a text is no UTF-8: pyarrow looks when it makes a str
        raise _damaged(location, exc) from exc
    return rows


@contextmanager
def _opened(container: Container) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as exc:
        raise MissingDependencyError(
            "Parquet files need 'pyarrow', which is not installed. "
            "Run: pip install 'patchcache[build]'"
        ) from exc
    try:
        file = parquet.ParquetFile(ContainerFile(container), buffer_size=_BUFFER_BYTES)
    except (pyarrow.ArrowException, OSError, ValueError) as exc:
        raise _damaged(container.location, exc) from exc
    with file:
        yield file


def _row_number(row: PlanRow) -> int:
    return int(row.source.partition(":")[0])


def _damaged(location: str, exc: Exception) -> SourceError:
    lines = str(exc).splitlines() or [type(exc).__name__]
    reason = shorten(lines[0].rstrip(". "))
    return unreadable(location, reason, "as Parquet")
