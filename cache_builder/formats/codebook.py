"""The codebook: centroids and where they come from, in one `.safetensors` file.

The file holds two tensors, `centroids` (M, K, D) and `counts` (M, K), and one metadata entry,
`patchcache`, whose value is the JSON of `CodebookHeader`. M is the number of residual stages, 1
for plain k-means. Pixel codebooks are uint8, so that every distance is an exact integer and a
token is the same on every device, and int16 where M > 1, because what a stage leaves over has a
sign; feature codebooks are float32.

Two digests are kept apart. The *digest* names the centroids alone. The *fingerprint* names the
tokenizer: pixel rule, feature extractor with the digest of its weights, and codebook. How the
centroids were fitted is recorded beside them and belongs to neither.

A tokenizer that was learned elsewhere and comes from an installed plugin has the same file. Its
extractor is `plugin:NAME`, `plugin` says which distribution brings it, and its centroids are what
it says of itself: (M, K, 0) where it has none.

Token ids that another tool made, and that were imported, have a codebook as well. Its extractor is
`foreign:NAME`, the name that the tokenizer was given, and its centroids are (1, K, 0).
"""

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cache_builder import files
from cache_builder.errors import ArtifactError, ConfigError
from cache_builder.formats.codebook_header import (
    FOREIGN_PREFIX,
    FORMAT_VERSION,
    PLUGIN_PREFIX,
    CodebookHeader,
    ExtractorSpec,
    Metric,
    PixelRule,
    PluginSpec,
)
from cache_builder.formats.headers import check_format_version, first_problem, shorten
from cache_builder.stores import read_location

MAX_VOCAB_SIZE = 65_535  # id 65,535 marks "absent" in uint16 token arrays
CENTROID_TYPES = (np.uint8, np.int16, np.float32)

_METADATA_KEY = "patchcache"
_COPY_AGAIN = "Copy it again from its source."


class Codebook:
    """Centroids, their counts and their provenance.

    Attributes:
        centroids: (M, K, D) uint8 (pixels, 0..255), int16 (pixels in M > 1 stages: the later ones
            are residuals) or float32 (features).
        counts: (M, K) int64, how many sampled patches fell to each centroid.
        header: Provenance and identity.
    """

    def __init__(
        self,
        centroids: NDArray[Any],
        counts: NDArray[np.int64],
        *,
        metric: Metric,
        pixel_rule: PixelRule,
        extractor: ExtractorSpec,
        **provenance: Any,
    ) -> None:
        """Name the centroids by digest and fingerprint.

        Args:
            centroids: (M, K, D) uint8, int16 or float32.
            counts: (M, K) int64.
            metric: `l2` or `cosine`.
            pixel_rule: What happens to a view before the extractor.
            extractor: Which features the centroids live among.
            **provenance: `num_points`, `num_images`, `objective`, `fit`, `quality`, `versions`,
                `plugin`.

        Raises:
            ArtifactError: Wrong shapes or types, K > 65,535, or values that are not finite.
        """
        self.centroids = centroids
        self.counts = counts
        _check_arrays(centroids, counts, extractor)
        digest = _digest(centroids, metric)
        self.header = CodebookHeader(
            metric=metric,
            pixel_rule=pixel_rule,
            extractor=extractor,
            digest=digest,
            fingerprint=_fingerprint(pixel_rule, extractor, digest),
            **provenance,
        )

    @property
    def metric(self) -> Metric:
        """`l2` or `cosine`."""
        return self.header.metric

    @property
    def extractor(self) -> ExtractorSpec:
        """Which features the centroids live among."""
        return self.header.extractor

    @property
    def pixel_rule(self) -> PixelRule:
        """What happens to a view before the extractor."""
        return self.header.pixel_rule

    @property
    def fingerprint(self) -> str:
        """Identity of the tokenizer, SHA-256 in hexadecimal."""
        return self.header.fingerprint

    @property
    def num_stages(self) -> int:
        """M, residual stages; a patch gets M ids."""
        return int(self.centroids.shape[0])

    @property
    def vocab_size(self) -> int:
        """K, centroids per stage."""
        return int(self.centroids.shape[1])

    @property
    def dim(self) -> int:
        """D, length of a centroid."""
        return int(self.centroids.shape[2])

    @property
    def ids_shape(self) -> tuple[int, ...]:
        """Of the token ids of one view: (rows, cols), or (rows, cols, M) with M > 1 stages."""
        stages = (self.num_stages,) if self.num_stages > 1 else ()
        return (*self.pixel_rule.grid, *stages)

    @property
    def plugin(self) -> PluginSpec | None:
        """Which distribution brings the tokenizer; None where it is ours."""
        return self.header.plugin

    @property
    def is_fitted(self) -> bool:
        """Whether centroids are those of a fit of ours, and ids say which is nearest."""
        return not self.extractor.id.startswith((PLUGIN_PREFIX, FOREIGN_PREFIX))

    @property
    def has_centroids(self) -> bool:
        """Whether ids stand for vectors; a plugin need not say which."""
        return self.dim > 0

    @property
    def is_foreign(self) -> bool:
        """Whether another tool made the token ids, and its tokenizer is not here."""
        return self.extractor.id.startswith(FOREIGN_PREFIX)

    def require_centroids(self, what: str) -> None:
        """Refuse what needs centroids where there are none.

        Raises:
            ConfigError: There are none; the message begins with `what`.
        """
        if not self.has_centroids:
            raise ConfigError(
                f"{what} needs centroids, and the token ids of {self.extractor.id} come without "
                "any. Fit a codebook with `patchcache fit` and build with that."
            )

    @property
    def has_pixel_centroids(self) -> bool:
        """Whether centroids are pixels, which can be looked at and whose distances are exact."""
        return self.extractor.id == "pixel" and self.metric == "l2"

    @property
    def stores_features(self) -> bool:
        """Whether there are features to store: of a model, quantised by us."""
        return self.is_fitted and self.extractor.id != "pixel"

    @property
    def decodes_to_pixels(self) -> bool:
        """Whether token ids can be decoded to a picture."""
        return self.has_pixel_centroids if self.plugin is None else self.plugin.decodes_to_pixels

    def to_bytes(self) -> bytes:
        """Return the file's content; the same codebook gives the same bytes."""
        left_out = {"plugin"} if self.plugin is None else None
        fields = self.header.model_dump(mode="json", exclude=left_out)
        header = files.canonical_json(fields).decode()
        tensors = {
            "centroids": np.ascontiguousarray(self.centroids),
            "counts": np.ascontiguousarray(self.counts),
        }
        content: bytes = save(tensors, metadata={_METADATA_KEY: header})
        return content

    def save(self, path: str | Path) -> None:
        """Write the codebook, whole or not at all."""
        files.publish(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a codebook, from a path or a URL of an object store, and check it.

        Raises:
            FormatVersionError: The file was written by a newer version.
            ArtifactError: The file is missing, damaged, or its digest, fingerprint or
                counts are wrong.
        """
        try:
            data = read_location(path)
        except FileNotFoundError as exc:
            raise ArtifactError(
                f"There is no codebook at {path}. Make one with `patchcache fit --out {path}`."
            ) from exc
        except OSError as exc:
            raise _unreadable(str(path), exc) from exc
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> Self:
        """Read the content of a codebook file; `place` names it in errors.

        Raises:
            FormatVersionError: It was written by a newer version.
            ArtifactError: It is damaged, or its digest, fingerprint or counts are wrong.
        """
        try:
            tensors = load(data)
            text = _metadata(data).get(_METADATA_KEY)
            if text is None:
                raise ArtifactError(
                    f"{place} is a safetensors file but not a codebook: it has no "
                    f"`{_METADATA_KEY}` header. Pass a file that `patchcache fit` wrote."
                )
            header = _parse_header(text, place)
            centroids, counts = tensors["centroids"], tensors["counts"]
        except (SafetensorError, ValueError, KeyError) as exc:
            raise _unreadable(place, exc) from exc
        return cls._checked(centroids, counts, header, place)

    @classmethod
    def _checked(
        cls, centroids: NDArray[Any], counts: NDArray[np.int64], header: CodebookHeader, place: str
    ) -> Self:
        try:
            _check_arrays(centroids, counts, header.extractor)
        except ArtifactError as exc:
            raise ArtifactError(f"{place}: {exc}. {_COPY_AGAIN}") from exc
        digest = _digest(centroids, header.metric)
        fingerprint = _fingerprint(header.pixel_rule, header.extractor, digest)
        for name, stored, actual in (
            ("fingerprint", header.fingerprint, fingerprint),
            ("digest", header.digest, digest),
        ):
            if stored != actual:
                raise ArtifactError(
                    f"{place} is damaged: its header says {name} {shorten(stored)} but its content "
                    f"has {actual}. {_COPY_AGAIN}"
                )
        # The digest does not cover the counts, but they must add up.
        if header.num_points and (counts.sum(1) != header.num_points).any():
            raise ArtifactError(
                f"{place} is damaged: its counts do not add up to {header.num_points:,} patches. "
                f"{_COPY_AGAIN}"
            )
        codebook = cls.__new__(cls)
        codebook.centroids, codebook.counts, codebook.header = centroids, counts, header
        return codebook


def _metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file that has been read once without an error."""
    length = int.from_bytes(data[:8], "little")
    # The library lets a null pass.
    metadata: dict[str, str] | None = json.loads(data[8 : 8 + length]).get("__metadata__")
    return metadata or {}


def _unreadable(place: str, exc: Exception) -> ArtifactError:
    return ArtifactError(
        f"{place} cannot be read as a codebook ({shorten(str(exc))}). {_COPY_AGAIN}"
    )


def _parse_header(text: str, place: str) -> CodebookHeader:
    check_format_version(text, FORMAT_VERSION, place, way_out=_COPY_AGAIN)
    try:
        return CodebookHeader.model_validate_json(text)
    except ValidationError as exc:
        raise ArtifactError(
            f"{place}: the codebook header is damaged: {first_problem(exc)}. {_COPY_AGAIN}"
        ) from exc


def _check_arrays(
    centroids: NDArray[Any], counts: NDArray[np.int64], extractor: ExtractorSpec
) -> None:
    if centroids.ndim != 3 or centroids.dtype not in CENTROID_TYPES:
        raise ArtifactError(
            "centroids must be (M, K, D) uint8, int16 or float32, "
            f"not {centroids.shape} {centroids.dtype}"
        )
    if not centroids.shape[2] and not extractor.id.startswith((PLUGIN_PREFIX, FOREIGN_PREFIX)):
        raise ArtifactError(f"centroids of {extractor.id} have no values")
    if not 0 < centroids.shape[1] <= MAX_VOCAB_SIZE:
        raise ArtifactError(
            f"a codebook has 1 to {MAX_VOCAB_SIZE:,} centroids, not {centroids.shape[1]:,}"
        )
    if counts.shape != centroids.shape[:2] or counts.dtype != np.int64:
        raise ArtifactError(
            f"counts must be {centroids.shape[:2]} int64, not {counts.shape} {counts.dtype}"
        )
    if centroids.dtype == np.float32 and not np.isfinite(centroids).all():
        raise ArtifactError("centroids hold NaN or infinity")


def _digest(centroids: NDArray[Any], metric: Metric) -> str:
    little = centroids.astype(centroids.dtype.newbyteorder("<"), copy=False)
    shape = {"metric": metric, "shape": list(centroids.shape), "dtype": str(centroids.dtype)}
    return files.sha256_bytes(files.canonical_json(shape) + b"\0" + little.tobytes())


def _fingerprint(pixel_rule: PixelRule, extractor: ExtractorSpec, digest: str) -> str:
    identity = {
        "pixel_rule": pixel_rule.model_dump(mode="json"),
        "extractor": extractor.identity(),
        "codebook": digest,
    }
    return files.sha256_bytes(files.canonical_json(identity))
