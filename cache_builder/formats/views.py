"""Views: which crops of an image are tokenised.

A view is an integer box in the decoded, EXIF-upright, un-flipped picture, and whether the resized
crop is mirrored. View 0 is the largest centred square; the others are random resized crops in the
manner of BEiT. They are drawn from (seed, sample key, view index, picture size) and from nothing
else: not from the worker, the shard or the order. The boxes are stored in the cache all the same,
so a reader never has to draw one. The boxes of an imported cache may be another tool's: they are
`given`, and nothing draws them again.
"""

import hashlib
import math
import random
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from cache_builder.errors import ConfigError

Interpolation = Literal["bicubic", "bilinear"]
Range = Annotated[tuple[float, float], Field(description="lower and upper end")]

_NUM_TRIES = 10


class View(NamedTuple):
    """One crop of one picture, in pixels; `hflip` mirrors it after the resize."""

    top: int
    left: int
    height: int
    width: int
    hflip: bool


class ViewSpec(BaseModel, frozen=True, extra="forbid"):
    """How the views of every image of a cache are drawn, and the grid that they are cut into."""

    size: int = Field(224, gt=0, description="side of a resized view, pixels")
    patch_size: int = Field(16, gt=0, description="side of a patch of the resized view, pixels")
    interpolation: Interpolation = "bicubic"
    first_view: int = Field(0, ge=0, description="index of the first; 0 is the centred square")
    num_views: int = Field(1, gt=0, description="views per image")
    scale: Range = Field((0.2, 1.0), description="share of the picture's area that a crop covers")
    ratio: Range = Field((3 / 4, 4 / 3), description="width / height of a crop")
    hflip: float = Field(0.5, ge=0, le=1, description="probability that a random view is mirrored")
    seed: int = 0
    given: bool = Field(False, description="boxes that another tool drew, not those of the seed")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.size // self.patch_size, self.size // self.patch_size)

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialise(self)
        return {k: v for k, v in fields.items() if v or k not in ("first_view", "given")}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.size % self.patch_size:
            raise ValueError(
                f"view size {self.size} is not a multiple of patch size {self.patch_size}"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be 0 < low <= high <= 1, not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < low <= high, not {self.ratio}")
        return self


def draw_views(spec: ViewSpec, key: str, image_size: tuple[int, int]) -> list[View]:
    """Return the views of one image.

    Args:
        spec: How views are drawn.
        key: The sample's key; two images with the same key and size get the same boxes.
        image_size: (height, width) of the decoded, upright picture.

    Returns:
        `spec.num_views` views, from the one of index `spec.first_view` on.

    Raises:
        ConfigError: The views of the cache were given by another tool.
    """
    if spec.given:
        raise ConfigError(
            "The views of this cache were given when it was imported: they follow from no seed, "
            "and cannot be drawn again."
        )
    views = [] if spec.first_view else [centre_square(image_size)]
    for index in range(max(1, spec.first_view), spec.first_view + spec.num_views):
        rng = _generator(spec.seed, key, index)
        top, left, height, width = random_box(image_size, spec.scale, spec.ratio, rng)
        views.append(View(top, left, height, width, rng.random() < spec.hflip))
    return views


def centre_square(image_size: tuple[int, int]) -> View:
    """Return the largest centred square of a picture of (height, width), not mirrored."""
    height, width = image_size
    side = min(height, width)
    return View((height - side) // 2, (width - side) // 2, side, side, hflip=False)


def random_box(
    image_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: random.Random,
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop: (top, left, height, width).

    The crop of the BEiT family (arXiv:2106.08254, its code): up to ten tries of an area uniform in
    `scale` and an aspect ratio log-uniform in `ratio`, the corner uniform; when none fits, the
    largest centred box whose ratio lies within `ratio`.

    Args:
        image_size: (height, width) of the picture.
        scale: Lower and upper share of the picture's area.
        ratio: Lower and upper width / height.
        rng: Python's generator, whose `random`, `uniform` and `randint` do not change between
            versions; a test holds boxes recorded from the official code against it.
    """
    height, width = image_size
    for _ in range(_NUM_TRIES):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    if width / height < ratio[0]:
        w, h = width, min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w, h = min(width, max(1, round(height * ratio[1]))), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def _generator(seed: int, key: str, view_index: int) -> random.Random:
    digest = hashlib.sha256(f"{seed}\0{view_index}\0{key}".encode()).digest()
    return random.Random(int.from_bytes(digest))
