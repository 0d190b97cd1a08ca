"""Everything about a codebook but its numbers: metric, pixel rule, extractor, and where it is from.

The models here are the JSON in the metadata of a codebook file, and parts of other headers.
"""

from typing import Literal, Self

from pydantic import BaseModel, Field, JsonValue, model_validator

from cache_builder.formats.views import Interpolation

FORMAT_VERSION = 1
PLUGIN_PREFIX = "plugin:"
FOREIGN_PREFIX = "foreign:"

Metric = Literal["l2", "cosine"]


class PixelRule(BaseModel, frozen=True, extra="forbid"):
    """What a tokenizer does to a view before it looks at it."""

    size: int = Field(224, gt=0, description="side of the resized view, pixels")
    patch_size: int = Field(16, gt=0, description="side of the pixels of one token")
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = Field((0.0, 0.0, 0.0), description="of RGB in [0, 1]")
    std: tuple[float, float, float] = Field((1.0, 1.0, 1.0), description="of RGB in [0, 1]")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of token ids."""
        return (self.size // self.patch_size, self.size // self.patch_size)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.size % self.patch_size:
            raise ValueError(
                f"image size {self.size} is not a multiple of patch size {self.patch_size}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        return self


class ExtractorSpec(BaseModel, frozen=True, extra="forbid"):
    """Which patch features are quantised. `weights` says where the weights were found."""

    id: str = Field(
        description="`pixel`, `open_clip:MODEL`, `timm:MODEL`, `plugin:NAME` or `foreign:NAME`"
    )
    layer: str = Field("", description="which map of the model; empty for pixels")
    args: dict[str, JsonValue] = Field(default_factory=dict, description="model arguments")
    weights_digest: str = Field("", description="SHA-256 of the weights; empty for pixels")
    weights: str = Field("", description="pretrained tag or file; not part of the identity")

    def identity(self) -> dict[str, JsonValue]:
        """Return the fields that change what the extractor computes."""
        return {
            "id": self.id,
            "layer": self.layer,
            "args": dict(self.args),
            "weights_digest": self.weights_digest,
        }


class PluginSpec(BaseModel, frozen=True, extra="forbid"):
    """Where a tokenizer that is installed comes from, and what else it can do."""

    distribution: str = Field(description="what to install")
    version: str = Field("", description="that the file was written with")
    decodes_to_pixels: bool = Field(False, description="whether it turns ids into pictures")


class CodebookHeader(BaseModel, frozen=True, extra="forbid"):
    """Everything about a codebook but the numbers."""

    format_version: int = FORMAT_VERSION
    metric: Metric
    pixel_rule: PixelRule
    extractor: ExtractorSpec
    digest: str
    fingerprint: str
    num_points: int = Field(0, ge=0, description="patches that the centroids were fitted to")
    num_images: int = Field(0, ge=0, description="images that those patches come from")
    objective: tuple[float, ...] = Field((), description="mean squared distance per iteration")
    fit: dict[str, JsonValue] = Field(default_factory=dict, description="settings of the fit")
    quality: dict[str, JsonValue] = Field(default_factory=dict, description="measured values")
    versions: dict[str, str] = Field(default_factory=dict, description="library versions")
    plugin: PluginSpec | None = Field(None, description="left out where the tokenizer is ours")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.plugin is not None) != self.extractor.id.startswith(PLUGIN_PREFIX):
            raise ValueError(f"extractor {self.extractor.id} and plugin {self.plugin} disagree")
        return self
