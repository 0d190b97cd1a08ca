"""`patchcache build --extend`: more views of a finished cache, or targets of further tokenizers.

What is added lies in layers: folders below the cache, each with the targets of one tokenizer for
one range of views. What the cache has is neither read nor written again, but for its images, which
are decoded once for all that is missing; only the manifest is replaced, when every layer is whole.
A cache extended to V views reads like one that was built with V views.
"""

from pathlib import Path
from typing import NamedTuple

from cache_builder.build import (
    BuildSummary,
    Progress,
    build_targets,
    layer_spec,
)
from cache_builder.build_worker import BuildTask
from cache_builder.commit import holder, layer_name, layer_store
from cache_builder.errors import ConfigError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.manifest import (
    CODEBOOK_NAME,
    PLAN_NAME,
    CacheManifest,
    CacheSpec,
    read_model,
)
from cache_builder.formats.payloads import FeatureType
from cache_builder.formats.plan import BuildPlan
from cache_builder.planning import LayerSpec, settle_layer
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.stores import Store, absolute_location, open_store


class ExtendOptions(NamedTuple):
    """What a user may say about an extension."""

    cache: str | Path
    codebooks: tuple[str | Path, ...] = ()  # of tokenizers to add
    num_views: int | None = None  # of every tokenizer afterwards; None: as many as there are
    images: str | None = None  # where the images of a cache without images lie now
    soft_top_k: int | None = None  # of the tokenizers that are added
    soft_temperature: float | None = None
    store_features: FeatureType | None = None
    device: str = "auto"
    weights: str | None = None
    cluster: ClusterOptions = ClusterOptions()


class _Tokenizer(NamedTuple):
    """A tokenizer whose targets a cache has, or is to have."""

    codebook: Codebook
    spec: CacheSpec  # of its first views
    num_views: int  # that are there


def run(options: ExtendOptions, progress: Progress | None = None) -> BuildSummary:
    """Give a finished cache what it lacks of these views and tokenizers.

    Raises:
        ArtifactError: The cache is unfinished or damaged, or a codebook is.
        ConfigError: There would be fewer views than there are, or they were given; payloads are
            asked for and no tokenizer is added; or images are named that the cache holds.
        CacheInUseError: Another driver writes there.
    """
    _refuse_lone_payloads(options)
    store = open_store(options.cache)
    CacheManifest.load(store)  # says what is missing before anything is written
    with store.lock(holder()):
        manifest = CacheManifest.load(store)
        if manifest.view_spec.given:
            raise ConfigError(
                f"The views of {options.cache} were given when it was imported; no others can be "
                "drawn beside them. Build a cache from its images."
            )
        if options.images is not None and manifest.spec.images_in_cache != "none":
            raise ConfigError(
                f"{options.cache} holds its images, and is extended from them. Leave --images out."
            )
        plan = read_model(BuildPlan, store, PLAN_NAME)
        layers = _missing(options, _tokenizers(options, store, manifest))
        if not layers:
            return BuildSummary(manifest, num_units_kept=0)
        for layer in layers:
            settle_layer(layer_store(store, layer.name), plan, layer)
        task = BuildTask(
            cache=absolute_location(options.cache),
            names=tuple(layer.name for layer in layers),
            images=options.images or plan.spec.source.location,
            device=options.device,
            weights=options.weights,
            decode_threads=options.cluster.threads_per_worker,
        )
        return build_targets(store, plan, task, options.cluster, progress)


def _refuse_lone_payloads(options: ExtendOptions) -> None:
    asked = {
        "--soft-top-k": options.soft_top_k,
        "--soft-temperature": options.soft_temperature,
        "--store-features": options.store_features,
    }
    for option, value in asked.items():
        if value is not None and not options.codebooks:
            raise ConfigError(
                f"{option} {value} is for a tokenizer that --codebook adds, and none is added: "
                "further views have the payloads of the cache. Leave it out."
            )


def _tokenizers(
    options: ExtendOptions, store: Store, manifest: CacheManifest
) -> dict[str, _Tokenizer]:
    """Return the tokenizers of the cache and those to add, by fingerprint."""
    there = [("", manifest.fingerprint, manifest.spec)]
    for layer in manifest.layers:
        spec = CacheManifest.load(layer_store(store, layer.name)).spec
        there.append((layer.name, layer.fingerprint, spec))
    found: dict[str, _Tokenizer] = {}
    for name, fingerprint, spec in sorted(there, key=lambda part: part[2].view_spec.first_view):
        if fingerprint in found:
            known = found[fingerprint]
            more = known.num_views + spec.view_spec.num_views
            found[fingerprint] = known._replace(num_views=more)
            continue
        holds = layer_store(store, name) if name else store
        codebook = Codebook.from_bytes(holds.read(CODEBOOK_NAME), holds.where(CODEBOOK_NAME))
        found[fingerprint] = _Tokenizer(codebook, spec, spec.view_spec.num_views)
    for path in options.codebooks:
        codebook = Codebook.load(path)
        asked = layer_spec(
            manifest.spec,
            codebook,
            soft_top_k=options.soft_top_k,
            soft_temperature=options.soft_temperature,
            store_features=options.store_features,
        ).spec
        planned = found.setdefault(codebook.fingerprint, _Tokenizer(codebook, asked, 0)).spec
        if asked.soft not in (None, planned.soft) or asked.features not in (None, planned.features):
            raise ConfigError(
                f"{options.cache} has targets of {path} already, with other payloads than are "
                "asked for. Leave out --soft-top-k, --soft-temperature and --store-features, or "
                "build a cache with them."
            )
    return found


def _missing(options: ExtendOptions, tokenizers: dict[str, _Tokenizer]) -> list[LayerSpec]:
    """Return the layers that bring every tokenizer to the number of views that is wanted."""
    most = max(tokenizer.num_views for tokenizer in tokenizers.values())
    wanted = options.num_views or most
    if wanted < most:
        raise ConfigError(
            f"{options.cache} has {most} views, more than --views {wanted}. "
            "`patchcache subset` makes a cache with fewer."
        )
    layers = []
    for codebook, spec, there in tokenizers.values():
        if there < wanted:
            views = spec.view_spec.model_copy(
                update={"first_view": there, "num_views": wanted - there}
            )
            more = spec.model_copy(update={"view_spec": views, "images_in_cache": "none"})
            layers.append(LayerSpec(layer_name(more), more, codebook))
    return layers
