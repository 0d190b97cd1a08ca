"""Progress of a command while it runs, on stderr, so that stdout holds results alone.

Without a terminal the bars print one line every few seconds instead.
"""

import sys
import time
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from cache_builder.measures import duration_text, size_text

if TYPE_CHECKING:
    from cache_builder.build_worker import UnitReport

_SECONDS_BETWEEN_LINES = 5.0
_MAX_NODES_SHOWN = 8


class Steps:
    """Progress of one kind of thing, with its rate and the time that is left."""

    def __init__(self, title: str, noun: str) -> None:
        """Name the work (`verifying`) and what it counts (`units`)."""
        self._title, self._noun = title, noun
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._first: tuple[float, int] | None = None  # when the first were done, and how many
        self._last_line_s = 0.0

    def __enter__(self) -> Self:
        """Start drawing."""
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop drawing."""
        if self._console.is_terminal:
            self._progress.stop()

    def update(self, done: int, total: int, note: str = "", rate: float | None = None) -> None:
        """Say that `done` of `total` are done, at `rate` per second.

        Without a rate it is measured from the first call on: what was done before it took the time
        of starting workers and loading models as well.
        """
        now_s = time.monotonic()
        if self._first is None:
            self._first, self._last_line_s = (now_s, done), now_s
        if rate is None:
            rate = (done - self._first[1]) / max(now_s - self._first[0], 1e-9)
        note = note or f"{rate:,.0f} {self._noun}/s"
        eta = f"eta {duration_text((total - done) / rate)}" if rate else ""
        if self._console.is_terminal:
            fields: dict[str, Any] = {"count": f"{done:,}/{total:,}", "note": note, "eta": eta}
            if self._task is None:
                self._task = self._progress.add_task(self._title, total=total, **fields)
            self._progress.update(self._task, completed=done, total=total, **fields)
        elif rate and now_s - self._last_line_s > _SECONDS_BETWEEN_LINES:
            self._last_line_s = now_s
            self._print_line(f"{self._title} {done:,}/{total:,} {self._noun}, {note}, {eta}")

    def _print_line(self, line: str) -> None:
        print(line, file=sys.stderr)


class FitProgress:
    """Sampling, then iterations."""

    def __init__(self, num_iterations: int) -> None:
        """Take the largest number of iterations of all restarts together."""
        self._num_iterations = num_iterations
        self._num_done = 0
        self._sampling = Steps("sampling", "images")
        self._fitting = Steps("k-means", "iterations")

    def __enter__(self) -> Self:
        """Start with the sampling."""
        self._sampling.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop what is drawn."""
        (self._fitting if self._num_done else self._sampling).__exit__(*exc_info)

    def sampled(self, done: int, total: int) -> None:
        """Images have been sampled."""
        self._sampling.update(done, total)

    def iterated(self, iteration: int, objective: float) -> None:
        """An iteration is over."""
        if not self._num_done:
            self._sampling.__exit__()
            self._fitting.__enter__()
        self._num_done += 1
        note = f"iteration {iteration}, mean squared distance {objective:,.4g}"
        self._fitting.update(self._num_done, self._num_iterations, note)


class _Rate:
    """What was built in which time: by all, or on one node."""

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._last_s = started_s
        self.num_images = self.num_views = self.num_skipped = self.bytes_read = 0

    def add(self, report: "UnitReport", now_s: float) -> None:
        self._started_s = min(self._started_s, now_s - report.seconds)
        self._last_s = now_s
        self.num_images += report.num_samples
        self.num_views += report.num_views
        self.num_skipped += report.num_skipped
        self.bytes_read += report.bytes_read

    def per_second(self, amount: float, until_s: float | None = None) -> float:
        """Return a rate, up to the last unit or up to now."""
        return amount / max((until_s or self._last_s) - self._started_s, 1e-9)

    @property
    def seconds(self) -> float:
        return self._last_s - self._started_s


class BuildProgress(Steps):
    """Images, views and bytes per second of a build, and of every node that takes part.

    Rates are those of what this run built: each begins with the first unit of a node, so that the
    time in which workers start and finished units are looked through is not in it. What is left is
    estimated from the rates of the nodes together: one that joins late counts from then on.
    """

    def __init__(self) -> None:
        """Begin with nothing seen."""
        super().__init__("building", "images")
        self._num_seen = self._num_kept_units = self._num_units = 0
        self._total = 0
        self._all: _Rate | None = None
        self._nodes: dict[str, _Rate] = {}
        self._node_tasks: dict[str, TaskID] = {}

    def __exit__(self, *exc_info: object) -> None:
        """Stop drawing, and say what came of it or how to go on."""
        super().__exit__(*exc_info)
        error = exc_info[0] if exc_info else None
        if error is None:
            for line in self.summary_lines():
                self._print_line(line)
        elif error in {KeyboardInterrupt, SystemExit} and self._total:
            self._print_line(
                f"stopped after {self._num_seen:,} of {self._total:,} images; "
                f"{self._num_units:,} finished units are kept"
            )

    def unit_done(self, report: "UnitReport", total: int) -> None:
        """Count a finished unit."""
        now_s = time.monotonic()
        self._num_seen += report.num_samples + report.num_skipped
        self._num_units += 1
        self._total = total
        if report.was_there:
            self._num_kept_units += 1
        else:
            if self._all is None:
                self._all = _Rate(now_s)
            self._all.add(report, now_s)
            self._nodes.setdefault(report.node, _Rate(now_s)).add(report, now_s)
        self._show(now_s)

    def summary_lines(self) -> list[str]:
        """Say how fast this run built, and how fast each node did where there are several."""
        if self._all is None:
            return []
        lines = [
            f"built        {self._all.num_images:,} images in "
            f"{duration_text(self._all.seconds)}: {self._rates(self._all)}"
        ]
        if len(self._nodes) > 1:
            width = max(map(len, self._nodes))
            lines += [
                f"on node      {name:{width}}  {rate.num_images:,} images, {self._rates(rate)}"
                for name, rate in sorted(self._nodes.items())
            ]
        return lines

    def _show(self, now_s: float) -> None:
        if self._all is None:
            self.update(self._num_seen, self._total, f"{self._num_kept_units:,} units kept", 0.0)
            return
        note = f"{self._rates(self._all, now_s)}, {self._all.num_skipped:,} skipped"
        rates = {
            name: rate.per_second(rate.num_images + rate.num_skipped, now_s)
            for name, rate in self._nodes.items()
        }
        if len(rates) > 1:
            note += self._show_nodes(rates)
        self.update(self._num_seen, self._total, note, sum(rates.values()))

    def _show_nodes(self, rates: dict[str, float]) -> str:
        """Show a line per node on a terminal; return what goes into the line of a plain log."""
        shown = sorted(rates.items())[:_MAX_NODES_SHOWN]
        if not self._console.is_terminal:
            more = f" and {len(rates) - len(shown)} more" if len(rates) > len(shown) else ""
            return f" ({', '.join(f'{name} {rate:,.1f}/s' for name, rate in shown)}{more})"
        for name, rate in shown:
            done = self._nodes[name].num_images
            fields: dict[str, Any] = {
                "count": f"{done:,}",
                "note": f"{rate:,.1f} images/s",
                "eta": "",
            }
            if name not in self._node_tasks:
                self._node_tasks[name] = self._progress.add_task(f"  {name}", total=None, **fields)
            self._progress.update(
                self._node_tasks[name], completed=done, total=self._total, **fields
            )
        return ""

    def _rates(self, rate: _Rate, until_s: float | None = None) -> str:
        return (
            f"{rate.per_second(rate.num_images, until_s):,.1f} images/s, "
            f"{rate.per_second(rate.num_views, until_s):,.1f} views/s, "
            f"{size_text(rate.per_second(rate.bytes_read, until_s))}/s read"
        )
