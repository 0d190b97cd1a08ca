"""What a person sees when a command ends: summaries and tables, on stdout."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue
from rich.console import Console
from rich.table import Table

from cache_builder.measures import decibel_text, size_text
from cache_builder.stores import join_location

if TYPE_CHECKING:
    from cache_builder.appraisal import Appraisal
    from cache_builder.build import BuildSummary
    from cache_builder.cache_survey import CacheSurvey
    from cache_builder.fit import FitSummary
    from cache_builder.formats import CacheManifest
    from cache_builder.transform import TransformSummary
    from cache_builder.verify import VerifyReport
    from trainer.evaluate import ProbeResult
    from trainer.finetune import FinetuneSummary
    from trainer.train import TrainSummary

_TOP = 5  # of fewer classes, top 5 says nothing
_MAX_SKIPPED_LINES = 10
_MAX_BUILD_LINES = 5
_BAR_WIDTH = 30
_MAX_NOTES = 10
RECIPE_BATCH_SIZE = 256  # of `beit_drop`, which `build_lines` names
_SMALL_BATCH_SIZE = 64


def fit_lines(summary: "FitSummary", images: str, out: Path) -> list[str]:
    """Say what a fit did and what to run next."""
    from cache_builder.fit import POINTS_PER_CENTROID

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
        psnr = ""
        if last and summary.held_out_psnr is not None:
            psnr = f", PSNR {decibel_text(summary.held_out_psnr)}"
        stages = (
            f"{number} of {len(summary.held_out)} stages: " if len(summary.held_out) > 1 else ""
        )
        lines.append(
            f"held out     {stages}MSE {stage.mse:.4g}{psnr}, cosine {stage.cosine:.4f}, "
            f"relative error {stage.relative_error:.3f}"
        )
    if summary.sample_dir:
        size = ""  # with --images-per-class no -k changes it, and --sample is refused
        if not header.fit["images_per_class"]:
            default = POINTS_PER_CENTROID * summary.codebook.vocab_size
            size = f" and --sample {header.fit['sample'] or default}"
        lines.append(
            f"sample       {summary.sample_dir}, kept: a fit with another -k, these settings{size} "
            "reads no image"
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
        *(
            f"layer        {layer.name}: views {layer.first_view} to "
            f"{layer.first_view + layer.num_views - 1} of tokenizer {layer.fingerprint[:12]}"
            for layer in manifest.layers
        ),
        f"skipped      {manifest.num_skipped:,}{reasons}",
        f"size         {size_text(manifest.bytes)} in {len(manifest.shards)} shards{kept}",
        *_payload_lines(manifest),
        f"next         patchcache verify {out} --retokenize 100",
        f"             patchcache train beit_drop --cache {out} --out run/"
        f"{smaller_batch(manifest)}",
    ]


def smaller_batch(manifest: "CacheManifest") -> str:
    """Return what makes a recipe train on a cache with fewer samples than its batch has."""
    if manifest.num_samples >= RECIPE_BATCH_SIZE:
        return ""
    size = max(1, min(_SMALL_BATCH_SIZE, manifest.num_samples))
    return f" --set data.batch_size={size}"


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
        "layers": [layer.model_dump(mode="json") for layer in manifest.layers],
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
    lines = [
        f"samples      {result.num_train:,} to learn from, {result.num_test:,} to test on, "
        f"{result.num_classes:,} classes, chance {result.chance:.1%}",
        "features     random init   pre-trained",
        f"k-NN         {result.knn_random:11.1%}   {result.knn:11.1%}",
        f"linear probe {result.linear_random:11.1%}   {result.linear:11.1%}",
    ]
    if result.num_classes > _TOP:
        lines += [
            f"k-NN, top 5  {result.knn_top5_random:11.1%}   {result.knn_top5:11.1%}",
            f"linear, top 5{result.linear_top5_random:11.1%}   {result.linear_top5:11.1%}",
        ]
    return lines


def finetune_lines(summary: "FinetuneSummary") -> list[str]:
    """Say what fine-tuning came to."""
    top5 = f", top 5 {summary.top5:.1%}" if summary.num_classes > _TOP else ""
    return [
        f"checkpoint   {summary.checkpoint}",
        f"steps        {summary.steps:,}" + ("" if summary.finished else ", stopped early"),
        f"samples      {summary.num_train:,} to learn from, {summary.num_test:,} to test on, "
        f"{summary.num_classes:,} classes, chance {summary.chance:.1%}",
        f"accuracy     top 1 {summary.top1:.1%}{top5}",
        f"speed        {summary.images_per_s:,.0f} images/s over {summary.seconds:,.0f} s",
        "next         "
        + (
            f"patchcache export {summary.checkpoint} --out classifier.safetensors"
            if summary.finished
            else "the same command continues"
        ),
    ]


def print_description(description: dict[str, JsonValue]) -> None:
    """Print nested values as a two-column table on stdout."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _flatten("", description):
        table.add_row(name, value)
    Console(markup=False).print(table)


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
    from cache_builder import cache_facts, cache_table

    console = Console(markup=False, highlight=False)
    spec = survey.manifest.spec
    console.print(f"cache        {survey.location}")
    console.print(f"fingerprint  {survey.manifest.fingerprint}")
    for line in cache_table.tokenizer_lines(survey):
        console.print(f"tokenizer    {line}", soft_wrap=True)
    console.print(f"counted      {cache_table.surveyed_text(survey)}")
    table = Table(box=None, pad_edge=False)
    table.add_column("measure", style="bold")
    table.add_column("value", justify="right")
    table.add_column("beside", overflow="fold")
    for fact in cache_facts.facts(survey):
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
