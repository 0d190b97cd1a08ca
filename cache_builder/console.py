"""What a person sees while a command runs and when it ends: progress, summaries, tables.

Drawn on stderr, so that stdout holds results alone. Without a terminal the bars print one line
every few seconds instead.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import JsonValue
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from cache_builder.measures import size_text
from cache_builder.stores import join_location

if TYPE_CHECKING:
    from cache_builder.appraisal import Appraisal
    from cache_builder.build import BuildSummary
    from cache_builder.build_worker import UnitReport
    from cache_builder.cache_survey import CacheSurvey
    from cache_builder.fit import FitSummary
    from cache_builder.formats import CacheManifest
    from cache_builder.transform import TransformSummary
    from cache_builder.verify import VerifyReport
    from trainer.evaluate import ProbeResult
    from trainer.train import TrainSummary

_SECONDS_BETWEEN_LINES = 5.0
_MAX_SKIPPED_LINES = 10
_MAX_BUILD_LINES = 5
_BAR_WIDTH = 30
_MAX_NODES_SHOWN = 8
_MAX_NOTES = 10


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


def fit_lines(summary: "FitSummary", images: str, out: Path) -> list[str]:
    """Say what a fit did and what to run next."""
    header = summary.codebook.header
    lines = [
        f"codebook     {out}",
        f"fingerprint  {summary.codebook.fingerprint}",
        f"centroids    {summary.codebook.vocab_size:,} of {summary.codebook.dim} values, fitted to "
        f"{header.num_points:,} patches of {header.num_images:,} images",
        f"usage        {summary.usage.num_used:,} centroids used, "
        f"perplexity {summary.usage.perplexity:,.0f}",
    ]
    for number, stage in enumerate(summary.held_out, 1):
        last = number == len(summary.held_out)
        psnr = f", PSNR {summary.held_out_psnr:.2f} dB" if last and summary.held_out_psnr else ""
        stages = (
            f"{number} of {len(summary.held_out)} stages: " if len(summary.held_out) > 1 else ""
        )
        lines.append(
            f"held out     {stages}MSE {stage.mse:.4g}{psnr}, cosine {stage.cosine:.4f}, "
            f"relative error {stage.relative_error:.3f}"
        )
    if summary.sample_dir:
        lines.append(
            f"sample       {summary.sample_dir}, kept: a fit with another -k, these settings and "
            f"--sample {header.fit['sample'] or header.num_points} reads no image"
        )
    if summary.num_skipped:
        lines.append(f"left out     {summary.num_skipped:,} images that could not be decoded")
    lines.append(
        f"next         patchcache build --images {images} --codebook {out} --views 4 --out cache/"
    )
    return lines


def build_lines(summary: "BuildSummary", out: str) -> list[str]:
    """Say what a build did and what to run next."""
    manifest = summary.manifest
    kept = f", {summary.num_units_kept} of them kept from before" if summary.num_units_kept else ""
    reasons = (
        f", with reasons in {join_location(out, 'skipped.jsonl')}" if manifest.num_skipped else ""
    )
    rows, cols = manifest.grid
    return [
        f"cache        {out}",
        f"fingerprint  {manifest.fingerprint}",
        f"images       {manifest.num_samples:,}, {manifest.view_spec.num_views} views each, "
        f"{rows} x {cols} token ids per view",
        f"skipped      {manifest.num_skipped:,}{reasons}",
        f"size         {size_text(manifest.bytes)} in {len(manifest.shards)} shards{kept}",
        *_payload_lines(manifest),
        f"next         patchcache verify {out} --retokenize 100",
        f"             patchcache train beit_drop --cache {out} --out run/",
    ]


def _payload_lines(manifest: "CacheManifest") -> Iterator[str]:
    num_samples = manifest.num_samples
    if (soft := manifest.soft) and (settings := manifest.spec.soft):
        yield (
            f"soft         top {settings.top_k}, perplexity {soft.perplexity:.3g}, "
            f"{soft.mass:.1%} of all probability, {size_text(soft.bytes / num_samples)} per image"
        )
    if (features := manifest.features) and (stored := manifest.spec.features):
        yield (
            f"features     {stored.dim:,} values as {stored.dtype}, "
            f"relative error {features.relative_error:.2g}, cosine {features.cosine:.6f}, "
            f"{size_text(features.bytes / num_samples)} per image"
        )


def build_result(summary: "BuildSummary", out: str) -> dict[str, JsonValue]:
    """Return what a build did, for a script."""
    manifest = summary.manifest
    return {
        "cache": out,
        "fingerprint": manifest.fingerprint,
        "num_samples": manifest.num_samples,
        "num_views": manifest.num_samples * manifest.view_spec.num_views,
        "num_skipped": manifest.num_skipped,
        "num_shards": len(manifest.shards),
        "num_units_kept": summary.num_units_kept,
        "bytes": manifest.bytes,
        **manifest.payload_totals(),
    }


def transform_lines(summary: "TransformSummary", out: str) -> list[str]:
    """Say what a conversion, merge or subset holds and what to run next."""
    manifest = summary.manifest
    kept = f", {summary.num_units_kept} of them kept from before" if summary.num_units_kept else ""
    relabelled = (
        [
            f"labels       {len(manifest.spec.class_names):,} classes united by name; "
            f"{summary.num_relabelled} caches had other labels"
        ]
        if summary.num_relabelled
        else []
    )
    return [
        f"cache        {out}",
        f"fingerprint  {manifest.fingerprint}",
        f"images       {manifest.num_samples:,}, {manifest.view_spec.num_views} views each, "
        f"{manifest.num_skipped:,} skipped",
        f"size         {size_text(manifest.bytes)} in {len(manifest.shards)} shards{kept}",
        *relabelled,
        *_payload_lines(manifest),
        f"next         patchcache verify {out} --retokenize 100",
    ]


def transform_result(summary: "TransformSummary", out: str) -> dict[str, JsonValue]:
    """Return what a conversion, merge or subset holds, for a script."""
    manifest = summary.manifest
    return {
        "cache": out,
        "fingerprint": manifest.fingerprint,
        "layout": manifest.spec.layout,
        "num_samples": manifest.num_samples,
        "num_views": manifest.num_samples * manifest.view_spec.num_views,
        "num_skipped": manifest.num_skipped,
        "num_shards": len(manifest.shards),
        "num_units_kept": summary.num_units_kept,
        "num_relabelled": summary.num_relabelled,
        "bytes": manifest.bytes,
        **manifest.payload_totals(),
    }


def verify_lines(report: "VerifyReport", cache: str, *, was_repair: bool) -> list[str]:
    """Say what was checked, what is wrong and what to run next."""
    lines = [
        f"files        {report.num_files:,} digested",
        f"samples      {report.num_samples:,}, and {report.num_skipped:,} skipped",
    ]
    for fingerprint, again in report.retokenized.items():
        which = f" by {fingerprint[:12]}" if len(report.retokenized) > 1 else ""
        lines.append(
            f"retokenised  {again.num_images:,} images{which}, {again.num_tokens:,} token ids: "
            f"{again.num_different:,} different, {again.num_near_ties:,} near ties"
        )
        if again.num_soft_ids:
            lines.append(
                f"             {again.num_soft_ids:,} soft ids: {again.num_soft_different:,} "
                f"different, {again.num_soft_near_ties:,} near ties; "
                f"{again.num_soft_probs_different:,} probabilities different"
            )
        if again.num_features:
            lines.append(
                f"             {again.num_features:,} features: "
                f"{again.num_features_different:,} different"
            )
    lines += _first("note", report.notes)
    lines += [f"repaired     {name}" for name in report.repaired]
    lines += [f"damage       {problem}" for problem in report.problems]
    lines += [f"refused      {reason}" for reason in report.refused]
    lines.append("result       " + ("damaged" if report.damages else "whole"))
    if report.damages and not was_repair:
        lines.append(f"next         patchcache verify {cache} --repair")
    return lines


def verify_result(report: "VerifyReport") -> dict[str, JsonValue]:
    """Return what was found, for a script."""
    return {
        **report._asdict(),
        "damages": [damage._asdict() for damage in report.damages],
        "problems": [*report.problems],
        "retokenized": {name: again._asdict() for name, again in report.retokenized.items()},
    }


def _first(title: str, texts: list[str]) -> list[str]:
    """Return a line for each of the first few."""
    shown = [f"{title:13}{text}" for text in texts[:_MAX_NOTES]]
    num_left = len(texts) - len(shown)
    return [*shown, f"{title:13}{num_left:,} further ones"] if num_left else shown


def train_lines(summary: "TrainSummary") -> list[str]:
    """Say what a training run came to and what to run next."""
    return [
        f"checkpoint   {summary.checkpoint}",
        f"steps        {summary.steps:,}" + ("" if summary.finished else ", stopped early"),
        f"loss         {summary.first_loss:.4f} -> {summary.final_loss:.4f}",
        f"speed        {summary.images_per_s:,.0f} images/s over {summary.seconds:,.0f} s, "
        f"{summary.data_wait_share:.1%} of it waiting for data",
        f"next         patchcache probe {summary.checkpoint}"
        if summary.finished
        else "next         the same command continues",
        f"             patchcache export {summary.checkpoint} --out vit.safetensors",
    ]


def probe_lines(result: "ProbeResult") -> list[str]:
    """Set the pre-trained features beside random ones."""
    return [
        f"samples      {result.num_train:,} to learn from, {result.num_test:,} to test on, "
        f"{result.num_classes:,} classes, chance {result.chance:.1%}",
        "features     random init   pre-trained",
        f"k-NN         {result.knn_random:11.1%}   {result.knn:11.1%}",
        f"linear probe {result.linear_random:11.1%}   {result.linear:11.1%}",
    ]


def print_description(description: dict[str, JsonValue]) -> None:
    """Print nested values as a two-column table on stdout."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _flatten("", description):
        table.add_row(name, value)
    Console().print(table)


def print_appraisal(appraisal: "Appraisal", page: Path | None) -> None:
    """Print what a codebook is worth as a table on stdout."""
    from cache_builder.appraisal_table import measures, picked_text, warnings

    table = Table(box=None, pad_edge=False)
    table.add_column("measure", style="bold")
    table.add_column("value", justify="right")
    table.add_column("beside", overflow="fold")
    for measure in measures(appraisal):
        table.add_row(measure.name, measure.value, measure.beside)
    console = Console(markup=False, highlight=False)
    console.print(f"images       {picked_text(appraisal)}")
    console.print(table)
    for warning in warnings(appraisal):
        console.print(f"limit        {warning}")
    for skipped in appraisal.skipped[:_MAX_SKIPPED_LINES]:
        console.print(f"left out     {skipped.source}: {skipped.reason}")
    if page:
        console.print(f"page         {page}")


def print_survey(survey: "CacheSurvey", page: Path | None) -> None:
    """Print what a cache holds as tables on stdout."""
    from cache_builder import cache_table

    console = Console(markup=False, highlight=False)
    spec = survey.manifest.spec
    console.print(f"cache        {survey.location}")
    console.print(f"fingerprint  {survey.manifest.fingerprint}")
    console.print(f"counted      {cache_table.surveyed_text(survey)}")
    table = Table(box=None, pad_edge=False)
    table.add_column("measure", style="bold")
    table.add_column("value", justify="right")
    table.add_column("beside", overflow="fold")
    for fact in cache_table.facts(survey):
        table.add_row(fact.name, fact.value, fact.beside)
    console.print(table)
    for number, counts in enumerate(survey.counts, 1):
        stage = f" of stage {number}" if spec.num_stages > 1 else ""
        lines = cache_table.histogram(counts)
        rows = [(f"{r.rank:,}", r.tokens, f"{r.cumulative_share:.1%}") for r in lines]
        _print_bars(console, (f"rank of id{stage}", "tokens", "and before"), rows)
    if shown := cache_table.class_lines(survey, 10, 5):
        _print_bars(console, ("class", "images", ""), [(name, n, "") for name, n in shown])
    if survey.skip_reasons:
        rows = [(reason, n, "") for reason, n in survey.skip_reasons[:_MAX_SKIPPED_LINES]]
        _print_bars(console, ("skipped because", "images", ""), rows)
    console.print()
    for line in cache_table.build_lines(survey.builds)[:_MAX_BUILD_LINES]:
        console.print(f"built        {line}")
    for warning in cache_table.warnings(survey):
        console.print(f"limit        {warning}")
    if page:
        console.print(f"page         {page}")


def _print_bars(
    console: Console, header: tuple[str, str, str], rows: list[tuple[str, int, str]]
) -> None:
    """Print counts with bars as long as they are; a negative one is a remark, not a count."""
    table = Table(box=None, pad_edge=False)
    name, count_name, last = header
    table.add_column(name, overflow="fold")
    table.add_column(count_name, justify="right")
    table.add_column("")
    table.add_column(last, justify="right")
    bar = "#" if console.options.ascii_only else "\u2588"
    top = max(max(count for _, count, _ in rows), 1)
    for text, count, note in rows:
        length = round(_BAR_WIDTH * count / top)
        table.add_row(text, f"{count:,}" if count >= 0 else "", bar * length, note)
    console.print()
    console.print(table)


def duration_text(seconds: float) -> str:
    """Return a time as a person reads it: 42 s, 3 min 05 s, 7 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours:,} h {minutes_left:02} min" if hours else f"{minutes} min {rest:02} s"


def _flatten(prefix: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(f"{prefix}.{name}".lstrip("."), inner)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value, 1):
            yield from _flatten(f"{prefix}.{number}", item)
    elif isinstance(value, list):
        yield prefix, ", ".join(_text(item) for item in value) or "-"
    else:
        yield prefix, _text(value)


def _text(value: JsonValue) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return str(value) or "-"
