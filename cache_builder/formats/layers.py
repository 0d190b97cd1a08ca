"""Targets of the same samples that lie side by side, read as if they were one cache.

A cache that was extended holds further views, or the targets of further tokenizers, in layers:
each has a manifest and units of its own, with the same samples in the same order, and no images.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_builder.errors import ArtifactError, TokenizerMismatchError
from cache_builder.formats.columns import ShardColumns
from cache_builder.formats.manifest import MANIFEST_NAME, CacheManifest, LayerInfo
from cache_builder.formats.payloads import PayloadName, sum_features, sum_soft
from cache_builder.formats.sample import CachedSample, SampleInfo
from cache_builder.formats.units import IMAGE_ALONE, Shard
from cache_builder.stores import Store, join_location, open_store

PER_VIEW = ("views", "token_ids", "soft_ids", "soft_probs", "features", "feature_scales")


class Part(NamedTuple):
    """A cache or a layer that holds some of the targets."""

    store: Store
    manifest: CacheManifest


def open_layer(store: Store, layer: LayerInfo) -> Part:
    """Open a layer, which must be the one that the cache's manifest describes.

    Raises:
        ArtifactError: It is another, or damaged.
    """
    below = open_store(join_location(store.location, layer.name))
    manifest = CacheManifest.load(below)
    views = manifest.view_spec
    found = manifest.fingerprint, views.first_view, views.num_views
    if found != (layer.fingerprint, layer.first_view, layer.num_views):
        raise ArtifactError(
            f"{store.where(MANIFEST_NAME)} describes layer {layer.name} as tokenizer, first view "
            f"and views {layer.fingerprint, layer.first_view, layer.num_views}, and the layer is "
            f"{found}. Run `patchcache verify --repair {store.location}`."
        )
    return Part(below, manifest)


class LayeredShard:
    """The samples of one unit, whose targets lie side by side in a cache and its layers."""

    def __init__(self, location: str, parts: list[Shard], images: Shard | None) -> None:
        """Take the shards of all parts, and that with the images where none of them has any."""
        self._location = location
        self._parts = parts
        self._images = images

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._parts[0])

    @property
    def keys(self) -> Sequence[str]:
        """Sample keys, in order."""
        return self._parts[0].keys

    def read(self, row: int, payloads: Collection[PayloadName] | None = None) -> CachedSample:
        """Return one sample with these optional payloads; None means all.

        Raises:
            ArtifactError: A layer has other samples than another part.
        """
        first, *others = (part.read(row, payloads) for part in self._parts)
        image = first.image
        if self._images is not None and (payloads is None or "image" in payloads):
            other = self._images.read(row, IMAGE_ALONE)
            self._check_key(first, other)
            image = other.image
        for other in others:
            self._check_key(first, other)
        joined: dict[str, Any] = {
            name: _joined([getattr(sample, name) for sample in (first, *others)])
            for name in PER_VIEW
        }
        return first._replace(image=image, **joined)

    def columns(self) -> ShardColumns:
        """Return the targets of all samples as arrays.

        Raises:
            ArtifactError: A layer has other samples than another part.
        """
        first, *others = (part.columns() for part in self._parts)
        for other in others:
            if other.keys != first.keys:
                raise ArtifactError(
                    f"{self._location}: a layer has other samples than another part. "
                    f"Run `patchcache verify {self._location}`."
                )
        every = (first, *others)
        return first._replace(
            views=np.concatenate([columns.views for columns in every], 1),
            token_ids=np.concatenate([columns.token_ids for columns in every], 1),
        )

    def part_bytes(self) -> Counter[str]:
        """Return what the parts of the unit take in all, bytes."""
        sizes = sum((part.part_bytes() for part in self._parts), Counter[str]())
        if self._images is not None:
            sizes["image"] = self._images.part_bytes()["image"]
        return sizes

    def info(self, row: int) -> SampleInfo:
        """Return where a sample came from and how large its picture was."""
        return self._parts[0].info(row)

    def close(self) -> None:
        """Release the files."""
        for part in (*self._parts, *([self._images] if self._images else [])):
            part.close()

    def _check_key(self, first: CachedSample, other: CachedSample) -> None:
        if other.key != first.key:
            raise ArtifactError(
                f"{self._location}: a layer has {other.key} where another part has {first.key}. "
                f"Run `patchcache verify {self._location}`."
            )


def _joined(arrays: list[NDArray[Any] | None]) -> NDArray[Any] | None:
    """Return arrays of several groups of views as one; None if one of them is missing."""
    kept = [array for array in arrays if array is not None]
    return np.concatenate(kept) if len(kept) == len(arrays) else None


def choose_tokenizer(base: CacheManifest, wanted: str | None, location: str) -> str:
    """Return the fingerprint that `wanted` begins."""
    if wanted is None:
        return base.fingerprint
    there = sorted({base.fingerprint, *(layer.fingerprint for layer in base.layers)})
    found = [fingerprint for fingerprint in there if fingerprint.startswith(wanted)]
    if len(found) != 1:
        raise TokenizerMismatchError(
            f"{location} holds targets of tokenizers {', '.join(there)}; {wanted!r} names "
            f"{len(found) or 'none'} of them. Give the first characters of one."
        )
    return found[0]


def merged_manifest(base: CacheManifest, parts: list[Part]) -> CacheManifest:
    """Return the manifest of a cache with all the views of some parts."""
    first, specs = parts[0].manifest, [part.manifest.spec for part in parts]
    view_spec = first.view_spec.model_copy(
        update={"num_views": sum(spec.view_spec.num_views for spec in specs)}
    )
    spec = first.spec.model_copy(
        update={
            "view_spec": view_spec,
            "images_in_cache": base.spec.images_in_cache,
            "soft": first.spec.soft if all(spec.soft for spec in specs) else None,
            "features": first.spec.features if all(spec.features for spec in specs) else None,
        }
    )
    shards = tuple(
        shard.model_copy(
            update={"files": tuple(f for p in parts for f in p.manifest.shards[number].files)}
        )
        for number, shard in enumerate(first.shards)
    )
    return base.model_copy(
        update={
            "spec": spec,
            "payloads": spec.payloads,
            "shards": shards,
            "codebook": first.codebook,
            "soft": sum_soft(p.manifest.soft for p in parts if p.manifest.soft),
            "features": sum_features(p.manifest.features for p in parts if p.manifest.features),
        }
    )
