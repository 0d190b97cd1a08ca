"""The measures of an appraisal by name, with what each means: for JSON, the terminal and the page.

JSON holds null where a number does not exist, and for the PSNR of a reconstruction without error.
"""

import math
from collections.abc import Iterator

from pydantic import JsonValue

from cache_builder.appraisal import Appraisal, StageUse
from cache_builder.label_quality import Compared, LabelQuality
from cache_builder.measures import Measure, decibel_text

_TOKENS_PER_CENTROID = 50  # below it, usage says more of the sample than of the codebook


def appraisal_result(appraisal: Appraisal) -> dict[str, JsonValue]:
    """Return every measure, for a script."""
    agreement = appraisal.agreement
    labels = appraisal.labels
    codebook = appraisal.codebook
    return {
        "kind": "appraisal",
        "fingerprint": codebook.fingerprint,
        "vocab_size": codebook.vocab_size,
        "num_stages": codebook.num_stages,
        "grid": list(codebook.pixel_rule.grid),
        "images": appraisal.picked.listing.info.location,
        "images_note": appraisal.picked.note,
        "num_images": len(appraisal.rows),
        "num_eligible": appraisal.picked.num_eligible,
        "num_tokens": int(appraisal.token_ids.size),
        "skipped": [skipped._asdict() for skipped in appraisal.skipped],
        "objective": appraisal.objective,
        "mse": appraisal.mse,
        "psnr_db": _finite(appraisal.psnr_db),
        "mean_image_psnr_db": _finite(appraisal.mean_image_psnr_db),
        "stages": [_stage_result(stage) for stage in appraisal.stages],
        "num_tie_patches": appraisal.num_tie_patches,
        "near_tie_share": appraisal.near_tie_share,
        "exact_tie_share": appraisal.exact_tie_share,
        "neighbours": {name: _finite(value) for name, value in agreement._asdict().items()},
        "labels": _label_result(labels) if labels else None,
        "labels_note": appraisal.labels_note,
    }


def picked_text(appraisal: Appraisal) -> str:
    """Say which images were looked at, and how many."""
    picked = appraisal.picked
    num_seen = len(appraisal.rows)
    text = f"{num_seen:,} of {picked.num_eligible:,} images, {picked.note}"
    return text + (f"; {len(appraisal.skipped):,} left out" if appraisal.skipped else "")


def measures(appraisal: Appraisal) -> list[Measure]:
    """Return the table, from the error to the labels."""
    return [
        *_error_measures(appraisal),
        *_usage_measures(appraisal),
        *_place_measures(appraisal),
        *(_label_measures(appraisal.labels) if appraisal.labels else ()),
    ]


def warnings(appraisal: Appraisal) -> list[str]:
    """Say what limits the numbers."""
    lines = []
    num_tokens, vocab_size = appraisal.token_ids.size, appraisal.codebook.vocab_size
    if num_tokens < _TOKENS_PER_CENTROID * vocab_size:
        lines.append(
            f"{num_tokens:,} tokens are fewer than {_TOKENS_PER_CENTROID} per centroid: usage is "
            "that of the sample more than of the codebook"
        )
    if not appraisal.labels:
        lines.append(f"no label measures: {appraisal.labels_note}")
    elif not appraisal.labels.probe:
        lines.append("no image probe: it needs two classes of two images or more")
    return lines


def _error_measures(appraisal: Appraisal) -> Iterator[Measure]:
    if appraisal.objective is not None and appraisal.mse is not None:
        yield Measure(
            "objective", f"{appraisal.objective:,.6g}", "",
            "Mean squared distance between a patch and what its ids stand for; lower is better.",
        )  # fmt: skip
        yield Measure(
            "objective per value", f"{appraisal.mse:,.6g}", "",
            "The same divided by the number of values of a patch; of pixels on the 0..255 scale.",
        )  # fmt: skip
    if appraisal.psnr_db is not None and appraisal.mean_image_psnr_db is not None:
        yield Measure(
            "PSNR", decibel_text(appraisal.psnr_db), "",
            "Of the reconstruction, over all pixels together; higher is better.",
        )  # fmt: skip
        yield Measure(
            "PSNR, mean of images", decibel_text(appraisal.mean_image_psnr_db), "",
            "The mean of every image's own PSNR: smooth images count for more.",
        )  # fmt: skip


def _usage_measures(appraisal: Appraisal) -> Iterator[Measure]:
    for number, stage in enumerate(appraisal.stages, 1):
        suffix = f", stage {number}" if len(appraisal.stages) > 1 else ""
        now, before = stage.usage, stage.usage_in_fit
        few, few_before = stage.idle, stage.idle_in_fit
        size = now.vocab_size
        yield Measure(
            f"centroids used{suffix}",
            f"{now.num_used:,} of {size:,}",
            f"in the fit {before.num_used:,}" if before else "",
            "Ids that occur at all.",
        )
        yield Measure(
            f"perplexity{suffix}",
            f"{now.perplexity:,.1f} ({now.perplexity / size:.0%} of K)",
            f"in the fit {before.perplexity:,.1f}" if before else "",
            "2 to the entropy of the ids: K if all were equally frequent. It grows with the number "
            "of tokens looked at.",
        )
        yield Measure(
            f"dead centroids{suffix}",
            f"{few.num_dead:,}",
            f"in the fit {few_before.num_dead:,}" if few_before else "",
            "Centroids that no patch falls to.",
        )
        yield Measure(
            f"single-member centroids{suffix}",
            f"{few.num_single:,}",
            f"in the fit {few_before.num_single:,}" if few_before else "",
            "Centroids that one patch falls to: in the fit, a memory of that patch.",
        )
        yield Measure(
            f"rare centroids{suffix}",
            f"{few.num_rare:,}",
            f"in the fit {few_before.num_rare:,}" if few_before else "",
            "Fewer patches than a tenth of an even share, the dead ones included.",
        )
        yield Measure(
            f"largest share{suffix}",
            f"{now.max_share:.2%}",
            f"even share {1 / size:.2%}",
            "Of the most frequent id.",
        )


def _place_measures(appraisal: Appraisal) -> Iterator[Measure]:
    if appraisal.near_tie_share is not None:
        exact = appraisal.exact_tie_share
        yield Measure(
            "near ties",
            f"{appraisal.near_tie_share:.3%}",
            "" if exact is None else f"exact {exact:.3%}",
            f"Of {appraisal.num_tie_patches:,} patches, those whose two nearest centroids differ "
            "by at most 1e-4 of the squared distance: another device may choose the other. An "
            "exact tie of pixels goes to the lower id everywhere.",
        )
    agreement = appraisal.agreement
    for name, value in (("right", agreement.horizontal), ("below", agreement.vertical)):
        if not math.isnan(value):
            yield Measure(
                f"same id {name}",
                f"{value:.2%}",
                f"shuffled {agreement.shuffled:.2%}",
                "Patches with the id of their neighbour; beside it, the share expected if the ids "
                "of every image were shuffled in place.",
            )


def _label_measures(labels: LabelQuality) -> Iterator[Measure]:
    yield Measure(
        "mutual information",
        f"{labels.mutual_information.value:.4f} nats",
        f"shuffled {labels.mutual_information.shuffled:.4f}",
        f"Of the id of a patch and the label of its image, Miller-Madow; {labels.num_images:,} "
        f"images of {labels.num_classes:,} classes. Higher is better.",
    )
    yield Measure(
        "normalised mutual information",
        f"{labels.normalised.value:.4f}",
        f"shuffled {labels.normalised.shuffled:.4f}",
        "Over the mean of the entropies of ids and labels, not corrected; 0 to 1.",
    )
    yield Measure(
        "purity",
        f"{labels.purity.value:.2%}",
        f"shuffled {labels.purity.shuffled:.2%}",
        "Patches whose label is the most frequent one of their id. Higher is better.",
    )
    yield Measure(
        "TCAS, reconstructed",
        f"{labels.tcas_reconstructed.value:.4f}",
        f"shuffled {labels.tcas_reconstructed.shuffled:.4f}",
        "How alike the id histograms of two classes are. Our reconstruction of the measure of "
        "ClusterMIM (arXiv:2407.09087): values need not be the paper's. Lower is better.",
    )
    if not (probe := labels.probe):
        return
    yield Measure(
        "image probe",
        f"{probe.accuracy.value:.1%}",
        f"shuffled {probe.accuracy.shuffled:.1%}, largest class {probe.largest_class:.1%}",
        f"Accuracy of naive Bayes on token histograms of {probe.num_images:,} images, each "
        "predicted by a model that did not see it. Higher is better.",
    )
    yield Measure(
        "image probe, mean recall",
        f"{probe.mean_recall.value:.1%}",
        f"shuffled {probe.mean_recall.shuffled:.1%}, chance {probe.chance_recall:.1%}",
        "The same averaged over classes, so that a large class does not count for more.",
    )


def _stage_result(stage: StageUse) -> dict[str, JsonValue]:
    fitted = None
    if stage.usage_in_fit and stage.idle_in_fit:
        fitted = {**stage.usage_in_fit._asdict(), **stage.idle_in_fit._asdict()}
    return {
        **stage.usage._asdict(),
        "perplexity_share": stage.usage.perplexity / stage.usage.vocab_size,
        **stage.idle._asdict(),
        "in_fit": fitted,
    }


def _label_result(labels: LabelQuality) -> dict[str, JsonValue]:
    probe = labels.probe
    return {
        "num_images": labels.num_images,
        "num_classes": labels.num_classes,
        "mutual_information_nats": _both(labels.mutual_information),
        "normalised_mutual_information": _both(labels.normalised),
        "purity": _both(labels.purity),
        "tcas_reconstructed": _both(labels.tcas_reconstructed),
        "image_probe": probe
        and {
            "num_images": probe.num_images,
            "num_classes": probe.num_classes,
            "accuracy": _both(probe.accuracy),
            "largest_class": probe.largest_class,
            "mean_recall": _both(probe.mean_recall),
            "chance_recall": probe.chance_recall,
        },
    }


def _both(compared: Compared) -> dict[str, JsonValue]:
    return {"value": compared.value, "shuffled": compared.shuffled}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
