"""What a cache holds: the commit record of every unit, and the manifest of all of them.

    plan.json, plan/    what will be built: see `formats.plan`
    units/000000.json   `UnitRecord`: written last by the worker that finished the unit
    manifest.json       `CacheManifest`: written when every unit is there

A cache is a directory or a prefix of an object store. The manifest is written last, so its
presence means that the build finished; a place without one is a build still running or one that
died, and readers refuse it. A unit is finished when its record is there and the files that it
names have the digests that it says, whatever else lies there.

Nothing about a cache is inferred from file names, listing order or times. If a reader needs to
know it, it is a field here. No field depends on when, where or how fast the build ran: the same
inputs give the same bytes.

Fields of what a cache does not have (`soft`, `features`, `extra`, ...) are left out, not null.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    NonNegativeInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from cache_builder import files
from cache_builder.errors import ArtifactError
from cache_builder.formats.headers import FileName, check_format_version, first_problem, shorten
from cache_builder.formats.payloads import (
    FeatureSpec,
    FeatureTotals,
    PayloadArray,
    PayloadName,
    SoftSpec,
    SoftTotals,
    payload_arrays,
)
from cache_builder.formats.views import ViewSpec
from cache_builder.stores import Store, open_store

FORMAT_VERSION = 1
PLAN_NAME = "plan.json"
MANIFEST_NAME = "manifest.json"
CODEBOOK_NAME = "codebook.safetensors"
SKIPPED_NAME = "skipped.jsonl"

Layout = Literal["webdataset", "zarr"]
ImagesInCache = Literal["original", "resized", "none"]
SourceKind = Literal["folder", "webdataset", "zip", "parquet", "list", "cache"]

Content = bytes  # where a field of that name hides the type
_Model = TypeVar("_Model", bound=BaseModel)


class SourceInfo(BaseModel, frozen=True, extra="forbid"):
    """Where the images come from; a cache without images is joined to them by key."""

    kind: SourceKind
    location: str = Field(
        description="absolute path or URL of a folder, or of files with brace patterns"
    )
    num_samples: int = Field(ge=0)


_OPTIONAL = frozenset({"soft", "features", "has_extra", "layers", "store_files"})


class LeavesOutUnset(BaseModel, frozen=True, extra="forbid"):
    """A model whose fields that not every cache has are written only where they are set."""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        return {name: value for name, value in fields.items() if value or name not in _OPTIONAL}


class CacheSpec(LeavesOutUnset, frozen=True, extra="forbid"):
    """The settings of a build: two builds with equal specs and sources give equal bytes."""

    fingerprint: str = Field(description="identity of the tokenizer")
    vocab_size: int = Field(gt=0, le=65_535)
    num_stages: int = Field(1, gt=0, description="ids per patch; arrays have an M axis if > 1")
    grid: tuple[int, int] = Field(description="rows and columns of token ids")
    view_spec: ViewSpec
    layout: Layout
    images_in_cache: ImagesInCache
    resized_short_side: int = Field(256, gt=0, description="of `resized` images, pixels")
    jpeg_quality: int = Field(92, ge=1, le=100, description="of `resized` images")
    unit_size: int = Field(gt=0, description="largest number of samples of a unit")
    source: SourceInfo
    class_names: tuple[str, ...] = Field((), description="name of label 0, 1, ...")
    soft: SoftSpec | None = Field(None, description="of the payload `soft`")
    features: FeatureSpec | None = Field(None, description="of the payload `features`")
    has_extra: bool = Field(False, description="samples carry further columns of the source")

    @property
    def tokens_shape(self) -> tuple[int, ...]:
        """Shape of one sample's token ids: (V, rows, cols), and M where M > 1."""
        stages = (self.num_stages,) if self.num_stages > 1 else ()
        return (self.view_spec.num_views, *self.grid, *stages)

    @property
    def payload_arrays(self) -> dict[str, PayloadArray]:
        """What a sample has beside its views and token ids, by name."""
        return payload_arrays((self.view_spec.num_views, *self.grid), self.soft, self.features)

    @property
    def payloads(self) -> tuple[str, ...]:
        """What every sample carries."""
        image = () if self.images_in_cache == "none" else ("image",)
        soft = ("soft",) if self.soft else ()
        features = ("features",) if self.features else ()
        return ("tokens", "views", *image, *soft, *features)


class _Planned(BaseModel, frozen=True):
    """What `plan.json` says that the manifest says too."""

    format_version: int
    spec: CacheSpec
    num_units: int


class FileDigest(BaseModel, frozen=True, extra="forbid"):
    """A file of a cache, path relative to it."""

    path: FileName
    bytes: int = Field(ge=0)
    sha256: str

    @classmethod
    def of(cls, store: Store, name: str) -> Self:
        """Measure a file.

        Raises:
            FileNotFoundError: There is none of that name.
        """
        measure = store.measure(name)
        return cls(path=name, bytes=measure.bytes, sha256=measure.sha256)

    @classmethod
    def of_content(cls, name: str, content: Content) -> Self:
        """Measure what is to be written as `name`."""
        return cls(path=name, bytes=len(content), sha256=files.sha256_bytes(content))

    def problem(self, content: Content) -> str | None:
        """Say what is wrong with the content of the file, or None."""
        if len(content) != self.bytes:
            return f"has {len(content):,} bytes, expected {self.bytes:,}"
        actual = files.sha256_bytes(content)
        if actual != self.sha256:
            return f"has SHA-256 {actual}, expected {shorten(self.sha256)}"
        return None

    def damage(self, store: Store) -> str | None:
        """Say what is wrong with the file where it lies, or None."""
        place = store.where(self.path)
        try:
            size = store.size(self.path)
            if size != self.bytes:
                return f"{place} has {size:,} bytes, expected {self.bytes:,}"
            actual = store.measure(self.path).sha256
        except FileNotFoundError:
            return f"{place} is missing"
        return (
            None
            if actual == self.sha256
            else (f"{place} has SHA-256 {actual}, expected {self.sha256}")
        )


class SkippedSample(BaseModel, frozen=True, extra="forbid"):
    """An image that could not be tokenised, and why."""

    key: str
    source: str
    reason: str


class SampleEntry(BaseModel, frozen=True, extra="forbid"):
    """Where the members of one sample lie in a tar: extension -> (offset, size) in bytes."""

    key: str
    members: dict[str, tuple[NonNegativeInt, NonNegativeInt]]


class UnitRecord(LeavesOutUnset, frozen=True, extra="forbid"):
    """`units/NNNNNN.json`: the commit record of one unit."""

    format_version: int = FORMAT_VERSION
    unit: int = Field(ge=0)
    num_samples: int = Field(ge=0)
    files: tuple[FileDigest, ...]
    skipped: tuple[SkippedSample, ...] = ()
    samples: tuple[SampleEntry, ...] = Field((), description="WebDataset layout only")
    soft: SoftTotals | None = Field(None, description="measured, of the payload `soft`")
    features: FeatureTotals | None = Field(None, description="measured, of the payload `features`")


class Written(NamedTuple):
    """What a unit writer wrote."""

    files: tuple[FileDigest, ...]
    num_samples: int
    samples: tuple[SampleEntry, ...]  # WebDataset layout only
    payload_bytes: Counter[PayloadName]  # of optional payloads, without the headers of a tar


class ShardInfo(BaseModel, frozen=True, extra="forbid"):
    """One unit of a finished cache."""

    name: str
    num_samples: int = Field(ge=0)
    num_skipped: int = Field(ge=0)
    files: tuple[FileDigest, ...] = Field(description="the tar, or this unit's Zarr shards")
    record: FileDigest = Field(description="the unit's commit record")

    @property
    def bytes(self) -> int:
        """Size of the shard's files."""
        return sum(file.bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """Digest of the one file; of several, the digest of their digests."""
        if len(self.files) == 1:
            return self.files[0].sha256
        return files.sha256_bytes("".join(file.sha256 for file in self.files).encode())


class LayerInfo(BaseModel, frozen=True, extra="forbid"):
    """Further targets of the same samples, in a folder of their own."""

    name: str = Field(description="folder below the cache")
    fingerprint: str = Field(description="identity of the tokenizer")
    first_view: int = Field(ge=0)
    num_views: int = Field(gt=0)
    manifest: FileDigest


class CacheManifest(LeavesOutUnset, frozen=True, extra="forbid"):
    """`manifest.json`: what a finished cache holds."""

    format_version: int = FORMAT_VERSION
    spec: CacheSpec
    payloads: tuple[str, ...] = Field(description="what every sample carries")
    num_samples: int = Field(ge=0)
    num_skipped: int = Field(ge=0)
    shards: tuple[ShardInfo, ...]
    codebook: FileDigest
    store_files: tuple[FileDigest, ...] = Field((), description="metadata of the Zarr group")
    layers: tuple[LayerInfo, ...] = Field((), description="further views and tokenizers")
    soft: SoftTotals | None = Field(None, description="measured, of the payload `soft`")
    features: FeatureTotals | None = Field(None, description="measured, of the payload `features`")

    @property
    def fingerprint(self) -> str:
        """Identity of the tokenizer that made the token ids."""
        return self.spec.fingerprint

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of token ids."""
        return self.spec.grid

    @property
    def vocab_size(self) -> int:
        """K."""
        return self.spec.vocab_size

    @property
    def view_spec(self) -> ViewSpec:
        """How the views were drawn."""
        return self.spec.view_spec

    @property
    def tokenizers(self) -> dict[str, int]:
        """How many views each tokenizer has, by its fingerprint; the cache's own comes first."""
        num_views = {self.fingerprint: self.view_spec.num_views}
        for layer in sorted(self.layers, key=lambda layer: layer.fingerprint):
            num_views[layer.fingerprint] = num_views.get(layer.fingerprint, 0) + layer.num_views
        return num_views

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def payload_totals(self) -> dict[str, JsonValue]:
        """Return settings and measured values of `soft` and `features`, where the cache has them.

        `bytes_per_sample` is what a sample's payload takes on disk, without the headers of a tar.
        """
        return {
            name: {
                **settings.model_dump(mode="json"),
                **totals.model_dump(mode="json"),
                "bytes_per_sample": round(totals.bytes / self.num_samples, 1),
            }
            for name, settings, totals in (
                ("soft", self.spec.soft, self.soft),
                ("features", self.spec.features, self.features),
            )
            if settings and totals
        }

    @classmethod
    def load(cls, cache: str | Path | Store) -> Self:
        """Read the manifest of a finished cache, at a directory or a URL.

        Raises:
            ArtifactError: There is none, because the build has not finished, or it is damaged.
        """
        store = open_store(cache) if isinstance(cache, str | Path) else cache
        if not store.exists(MANIFEST_NAME):
            if store.exists(PLAN_NAME):
                raise ArtifactError(
                    f"{store.location} has no {MANIFEST_NAME}: the build has not finished. "
                    "Run the same `patchcache` command again; it resumes."
                )
            raise ArtifactError(
                f"{store.location} is not a cache: it has neither {MANIFEST_NAME} nor {PLAN_NAME}. "
                "Pass the directory that `patchcache build --out` wrote."
            )
        manifest = read_model(cls, store, MANIFEST_NAME)
        if contradiction := manifest._contradiction(store):
            raise ArtifactError(
                f"{store.where(MANIFEST_NAME)} is damaged: {contradiction}. "
                f"Run `patchcache verify --repair {store.location}`."
            )
        return manifest

    def _contradiction(self, store: Store) -> str | None:
        """Say where the manifest contradicts itself or the plan, or None."""
        for name in ("num_samples", "num_skipped"):
            total = sum(getattr(shard, name) for shard in self.shards)
            if getattr(self, name) != total:
                return f"{name} is {getattr(self, name)}, and its shards have {total}"
        if self.payloads != self.spec.payloads:
            found, expected = ", ".join(self.payloads), ", ".join(self.spec.payloads)
            return f"payloads are {shorten(found)}, and by its settings {expected}"
        if not store.exists(PLAN_NAME):
            return None  # readers need none
        plan = read_model(_Planned, store, PLAN_NAME)
        for name in CacheSpec.model_fields:
            if getattr(plan.spec, name) != getattr(self.spec, name):
                return f"{name} is not that of {PLAN_NAME}"
        if plan.num_units != len(self.shards):
            return f"it has {len(self.shards)} units, and {PLAN_NAME} {plan.num_units}"
        return None


def unit_record_name(unit: int) -> str:
    """Return the name of one unit's commit record."""
    return f"units/{unit:06d}.json"


def to_json(model: BaseModel) -> bytes:
    """Return the file content of one of this module's models."""
    return files.canonical_json(model.model_dump(mode="json")) + b"\n"


def read_model(
    model: type[_Model], store: Store, name: str, expected: FileDigest | None = None
) -> _Model:
    """Read one of this module's files.

    Args:
        model: What the file holds.
        store: Where it lies.
        name: Its name there.
        expected: What another file says of it.

    Raises:
        FormatVersionError: It was written by a newer version.
        ArtifactError: It is missing or damaged.
    """
    place = store.where(name)
    way_out = f"Run `patchcache verify --repair {store.location}`."
    try:
        text = store.read(name)
    except FileNotFoundError as exc:
        told = f"{place} is missing. Run the same `patchcache build` command again."
        raise ArtifactError(told) from exc
    if "format_version" in model.model_fields:
        check_format_version(text, FORMAT_VERSION, place, way_out=way_out)
    if expected and (problem := expected.problem(text)):
        raise ArtifactError(f"{place} {problem}. {way_out}")
    try:
        return model.model_validate_json(text)
    except ValidationError as exc:
        raise ArtifactError(f"{place} is damaged: {first_problem(exc)}. {way_out}") from exc
