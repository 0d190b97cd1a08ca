"""Class names, and which number each label is, known once every row has been seen.

A number in a label counts classes from 0. Names are numbered by rank. Negative numbers are in use
for "no label".
"""

import re
from collections.abc import Callable
from typing import Protocol

from cache_builder.errors import SourceError

MAX_CLASSES = 1_000_000

_NUMBER = re.compile(r"-?[0-9]{1,18}")


class Classes(Protocol):
    """Collects the labels of a source."""

    def add(self, label: int | str | None, where: str) -> None:
        """See the label of one row; `where` names it in errors."""

    def names(self) -> tuple[str, ...]:
        """Return the name of label 0, 1, ...; empty without labels."""

    def numbering(self) -> Callable[[int | str | None], int | None]:
        """Return the function from label to number."""


class FolderClasses:
    """The classes of an ImageFolder: one image outside all folders, and there are none."""

    def __init__(self) -> None:
        self._found: set[str] = set()
        self._is_flat = False

    def add(self, label: int | str | None, where: str) -> None:
        """See the folder that an image lies in, None for the root."""
        if label is None:
            self._is_flat = True
        else:
            self._found.add(str(label))

    def names(self) -> tuple[str, ...]:
        """Return the folders, sorted."""
        return () if self._is_flat else tuple(sorted(self._found))

    def numbering(self) -> Callable[[int | str | None], int | None]:
        """Return the rank of a folder, None in a flat source."""
        ranks: dict[int | str | None, int] = {name: i for i, name in enumerate(self.names())}
        return ranks.get


class ValueClasses:
    """The classes of labels that are numbers, or names, or numbers of given names."""

    def __init__(self, given: tuple[str, ...] = ()) -> None:
        """Take the names of the numbers where a source says them."""
        self._given = given
        self._texts: set[str] = set()
        self._all_numbers = True
        self._largest = -1

    def add(self, label: int | str | None, where: str) -> None:
        """See a label.

        Raises:
            SourceError: It is too large, or the names are too many, to be those of classes.
        """
        if label is None:
            return
        if isinstance(label, str):
            if not _NUMBER.fullmatch(label):
                self._all_numbers = False
            elif self._all_numbers:
                self._check_number(int(label), where)
            self._texts.add(label)
            if len(self._texts) > MAX_CLASSES:
                raise SourceError(
                    f"{where}: the labels have more than {MAX_CLASSES:,} values. "
                    "A label is the number or name of a class."
                )
        else:
            self._check_number(label, where)

    def names(self) -> tuple[str, ...]:
        """Return the given names, or the names found, or numbers as names."""
        if self._given:
            return self._given
        if not self._all_numbers:
            return tuple(sorted(self._texts))
        return tuple(str(number) for number in range(self._largest + 1))

    def numbering(self) -> Callable[[int | str | None], int | None]:
        """Return the function from label to number."""
        if self._given or self._all_numbers:
            return _number
        ranks: dict[int | str | None, int] = {name: i for i, name in enumerate(self.names())}
        return ranks.get

    def _check_number(self, number: int, where: str) -> None:
        limit = len(self._given) or MAX_CLASSES
        if number >= limit:
            raise SourceError(
                f"{where} has the label {number:,}, and classes are numbered below {limit:,}. "
                "Mend the label."
            )
        self._largest = max(self._largest, number)


def _number(label: int | str | None) -> int | None:
    number = -1 if label is None else int(label)
    return number if number >= 0 else None
