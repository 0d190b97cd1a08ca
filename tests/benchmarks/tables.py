"""Tables of Markdown, as docs/benchmarks.md has them."""

from collections.abc import Sequence


class Table:
    """A title, a head and rows; as a text it is Markdown, its columns as wide as they need."""

    def __init__(self, title: str, words: Sequence[str], figures: Sequence[str]) -> None:
        """Take the names of the columns: first those of words, then those of numbers."""
        self.title = title
        self.caption = ""
        self._num_words = len(words)
        self._rows: list[tuple[str, ...]] = [(*words, *figures)]

    def add_row(self, *cells: str) -> None:
        """Add a row, a cell for every column."""
        assert len(cells) == len(self._rows[0]), cells
        self._rows.append(cells)

    def __str__(self) -> str:
        widths = [max(4, *map(len, column)) for column in zip(*self._rows, strict=True)]
        lines = [self._line(row, widths) for row in self._rows]
        marks = [
            "-" * width if number < self._num_words else "-" * (width - 1) + ":"
            for number, width in enumerate(widths)
        ]
        lines.insert(1, f"| {' | '.join(marks)} |")
        return "\n".join(
            [self.title, "", *lines, *(["", self.caption] if self.caption else []), ""]
        )

    def _line(self, row: tuple[str, ...], widths: list[int]) -> str:
        cells = [
            cell.ljust(width) if number < self._num_words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"
