"""Points: the rows that a codebook is fitted to, wherever they lie.

A sample outgrows memory long before it outgrows a disk (4.19 million features of 4096 values are
34 GB as float16), so the points are a list of arrays, most of them memory maps of `.npy` files, and
nothing here ever makes one array of them. Who works on all points goes through them in blocks.

Features are stored as float16 to halve the disk, and read as float32, in which everything is
computed; uint8 pixels and int16 residuals of pixels are exact and stay what they are.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_READ_AS = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.float16): torch.float32,
    np.dtype(np.float32): torch.float32,
}


class PointSet:
    """Rows (n, D) in a fixed order.

    What reading returns may share memory with the set and is not to be written to.
    """

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Take arrays (n_i, D) of one type; their rows follow one another.

        Raises:
            ValueError: No array, or arrays that differ in type or D, or of another type.
        """
        if not arrays:
            raise ValueError("A PointSet needs at least one array; one of 0 rows will do.")
        first = arrays[0]
        if first.dtype not in _READ_AS:
            names = ", ".join(str(dtype) for dtype in _READ_AS)
            raise ValueError(f"Points are {names}, not {first.dtype}.")
        for array in arrays:
            if array.ndim != 2 or array.shape[1] != first.shape[-1] or array.dtype != first.dtype:
                raise ValueError(
                    f"Points of one set are (n, D) of one type: {first.dtype} {first.shape} and "
                    f"{array.dtype} {array.shape} do not fit together."
                )
        # Slices of np.memmap cost ten times those of plain arrays on the same memory.
        self._arrays = [np.asarray(array) for array in arrays]
        self._ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        self._dim = int(first.shape[1])
        self._dtype = _READ_AS[first.dtype]

    @classmethod
    def of(cls, points: Tensor | NDArray[Any]) -> Self:
        """Make a set of one tensor or array (n, D), without copying one that is on the CPU."""
        return cls([points.cpu().numpy() if isinstance(points, Tensor) else points])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def dim(self) -> int:
        """D, the number of values of a point."""
        return self._dim

    @property
    def dtype(self) -> torch.dtype:
        """The type that reading returns: uint8, int16 or float32."""
        return self._dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Return the rows from `start` up to `stop`, (stop - start, D).

        Raises:
            IndexError: There are no such rows.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"Rows {start} to {stop} of {len(self)} points do not exist.")
        parts = list(self.stored(start, stop))
        if len(parts) == 1 and parts[0].flags.writeable:
            return torch.from_numpy(parts[0]).to(self._dtype)
        block = torch.empty((stop - start, self._dim), dtype=self._dtype)
        if parts:
            np.concatenate(parts, out=block.numpy())
        return block

    def gather(self, indices: Tensor) -> Tensor:
        """Return the rows of `indices` (m,) int64 in that order, (m, D); repeats are allowed.

        Raises:
            IndexError: An index is negative or not below n.
        """
        wanted = indices.cpu().numpy()
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(
                f"Indices from {wanted.min()} to {wanted.max()} do not fit {len(self)} points."
            )
        # A disk is read in one direction, and the rows of one array in one step.
        order = np.argsort(wanted, kind="stable")
        ascending = wanted[order]
        owners = np.searchsorted(self._ends, ascending, side="right")
        rows = torch.empty((len(wanted), self._dim), dtype=self._dtype)
        out = rows.numpy()
        cuts = np.flatnonzero(np.diff(owners)) + 1
        for first, last in zip([0, *cuts], [*cuts, len(wanted)], strict=True):
            if first < last:
                array = self._arrays[owners[first]]
                offset = self._ends[owners[first]] - len(array)
                out[order[first:last]] = array[ascending[first:last] - offset]
        return rows

    def blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of the first row and the rows of every block of `rows` rows, in order.

        Raises:
            ValueError: `rows` is not positive.
        """
        if rows < 1:
            raise ValueError(f"A block has 1 row or more, not {rows}.")
        for start in range(0, len(self), rows):
            yield start, self.read(start, min(start + rows, len(self)))

    def stored(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Yield the rows from `start` up to `stop` as they are stored, array by array."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            array = self._arrays[number]
            offset = int(self._ends[number]) - len(array)
            part = array[start - offset : stop - offset]
            yield part
            start += len(part)
            number += 1
