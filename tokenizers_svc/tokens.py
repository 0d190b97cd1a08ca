"""What goes in and what comes out: a picture, its tokens, and what they cost."""

from typing import NamedTuple

from cache_builder.formats.payloads import SoftSpec
from cache_builder.formats.views import View


class Picture(NamedTuple):
    """What a client sends: the bytes of an image file, and which part of it is meant."""

    data: bytes
    view: View | None  # None is the largest centred square


class ImageFacts(NamedTuple):
    """What a picture turned out to be; its size is that of the upright picture."""

    width: int
    height: int
    format: str


class SoftTokens(NamedTuple):
    """The nearest centroids of every patch, patch by patch."""

    top_k: int
    ids: bytes  # little-endian uint16
    probabilities: bytes  # little-endian float16


class Tokens(NamedTuple):
    """What one picture came to."""

    ids: bytes  # little-endian uint16, row-major
    view: View
    image: ImageFacts
    soft: SoftTokens | None = None


class Timings(NamedTuple):
    """Where one picture spent its time, seconds; waiting for a thread that decodes is `queue_s`."""

    decode_s: float
    queue_s: float
    infer_s: float
    batch_size: int  # pictures that shared the run


class Key(NamedTuple):
    """What decides the ids of a picture."""

    sha256: str  # of the file
    fingerprint: str
    view: View | None
    soft: SoftSpec | None


class Outcome(NamedTuple):
    """The tokens of a picture and what they cost; nothing where they were kept."""

    tokens: Tokens
    timings: Timings | None
