"""The targets of a whole shard as arrays: what statistics read, never images, soft or features.

Sample by sample the parsing of small arrays costs more than everything that is done with them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_builder.errors import ArtifactError
from cache_builder.formats.sample import from_npy

NO_LABEL = -1


class ShardColumns(NamedTuple):
    """The samples of one shard, in order."""

    keys: list[str]
    labels: NDArray[np.int64]  # (n,), -1 for none
    image_sizes: NDArray[np.int32]  # (n, 2), height and width of the decoded picture
    views: NDArray[np.int32]  # (n, V, 5): top, left, height, width, hflip
    token_ids: NDArray[np.uint16]  # (n, V, rows, cols), or (n, V, rows, cols, M) with M > 1 stages


def no_columns(views_shape: tuple[int, ...], tokens_shape: tuple[int, ...]) -> ShardColumns:
    """Return the columns of a shard without samples; the shapes are those of one sample."""
    return ShardColumns(
        keys=[],
        labels=np.empty(0, np.int64),
        image_sizes=np.empty((0, 2), np.int32),
        views=np.empty((0, *views_shape), np.int32),
        token_ids=np.empty((0, *tokens_shape), np.uint16),
    )


def npy_column(members: Sequence[bytes], what: str) -> NDArray[Any]:
    """Stack .npy members of one shape and type; one header is parsed, the others are compared.

    Args:
        members: At least one.
        what: Names them in the error.

    Raises:
        ArtifactError: One is damaged, or has another shape or type than the first.
    """
    first = from_npy(members[0], what)
    size = len(members[0])
    header = members[0][: size - first.nbytes]
    start = len(header)
    for number, member in enumerate(members):
        if len(member) != size or not member.startswith(header):
            found = from_npy(member, what)
            raise ArtifactError(
                f"{what}: that of sample {number} is {found.shape} {found.dtype}, and of sample 0 "
                f"{first.shape} {first.dtype}. Run `patchcache verify` to see what else is wrong."
            )
    values = b"".join([member[start:] for member in members])
    return np.frombuffer(values, first.dtype).reshape(len(members), *first.shape)
