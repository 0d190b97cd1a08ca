"""One batch through the tokenizer, and what becomes of it when that fails.

An exception in a batch is nobody's fault until its pictures have been tried one by one; only those
that fail alone fail their callers. When all of them do, a blank picture tells whether the tokenizer
still works. If not, its exception is raised: a device that answers everything with an error must
not look ready.

Pictures that ask for soft targets share the batch; the tokenizer runs once for every kind.

Too little memory is not the fault of a picture either: the batch is tried in halves.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.formats.codebook import Codebook
from cache_builder.formats.payloads import SoftSpec
from cache_builder.soft_targets import soften
from cache_builder.tokenizers.quantizer import ResidualQuantizer

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class Tokenizer(Protocol):
    """What the service needs of a `PatchTokenizer`."""

    @property
    def codebook(self) -> Codebook:
        """What the token ids mean."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def quantizer(self) -> ResidualQuantizer:
        """What finds the centroids; asked for soft targets alone."""

    def features(self, pixels: Tensor) -> Tensor:
        """Return what is quantised, (B, N, D); asked for soft targets alone."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Return ids (B, rows, cols[, M]) of resized views (B, 3, S, S) uint8."""


class TokenizerFailedError(Exception):
    """The tokenizer raised for this picture alone; the cause says what."""


class SoftIds(NamedTuple):
    """The nearest centroids of every patch of one picture, flat, patch by patch; little-endian."""

    ids: NDArray[np.uint16]
    probabilities: NDArray[np.float16]


class Found(NamedTuple):
    """What the tokenizer says of one picture."""

    ids: NDArray[np.uint16]  # flat, row-major, little-endian
    soft: SoftIds | None = None


Outcome = Found | TokenizerFailedError


class Encoded(NamedTuple):
    """What a batch gave."""

    outcomes: Sequence[Outcome]  # one per picture
    largest: int  # pictures in one run that fitted into memory


def encode_batch(tokenizer: Tokenizer, views: Tensor, softs: Sequence[SoftSpec | None]) -> Encoded:
    """Return what the tokenizer says of every view (B, 3, S, S) uint8, or why it says nothing.

    Raises:
        Exception: The tokenizer fails on everything, even on a blank picture.
    """
    try:
        return Encoded(_encode(tokenizer, views, softs), len(views))
    except _OUT_OF_MEMORY:
        is_too_large = len(views) > 1
        if not is_too_large:
            logger.warning("out of memory with a single picture", exc_info=True)
    except Exception:
        is_too_large = False
        logger.warning(
            "a batch of %d failed; its pictures are tried one by one", len(views), exc_info=True
        )
    # Not within `except`, where the traceback still holds what the failed run had allocated.
    if is_too_large:
        return _in_halves(tokenizer, views, softs)
    outcomes = [
        _encode_alone(tokenizer, view, soft)
        for view, soft in zip(views.split(1), softs, strict=True)
    ]
    if all(isinstance(outcome, TokenizerFailedError) for outcome in outcomes):
        run_blank(tokenizer, 1)
    return Encoded(outcomes, len(views))


def run_blank(tokenizer: Tokenizer, num_views: int) -> None:
    """Run the tokenizer on grey pictures and look at what it says.

    Raises:
        RuntimeError: Its ids are not in the codebook.
        Exception: It fails even on those.
    """
    size = tokenizer.codebook.pixel_rule.size
    views = torch.full((num_views, 3, size, size), 128, dtype=torch.uint8)
    ids = tokenizer.encode(views)
    if not ((ids >= 0) & (ids < tokenizer.codebook.vocab_size)).all():
        raise RuntimeError("the tokenizer gives ids that its codebook does not have")


def _in_halves(tokenizer: Tokenizer, views: Tensor, softs: Sequence[SoftSpec | None]) -> Encoded:
    half = -(-len(views) // 2)
    logger.warning("out of memory with %d pictures: going on with %d at a time", len(views), half)
    if tokenizer.device.type == "cuda":
        torch.cuda.empty_cache()
    parts = [
        encode_batch(tokenizer, views[rows], softs[rows])
        for rows in (slice(half), slice(half, None))
    ]
    outcomes = [outcome for part in parts for outcome in part.outcomes]
    return Encoded(outcomes, parts[0].largest)


def _encode(tokenizer: Tokenizer, views: Tensor, softs: Sequence[SoftSpec | None]) -> list[Found]:
    kinds = list(dict.fromkeys(softs))
    if len(kinds) == 1:
        return _encode_kind(tokenizer, views, kinds[0])
    found: dict[int, Found] = {}
    for kind in kinds:
        rows = [row for row, soft in enumerate(softs) if soft == kind]
        found.update(zip(rows, _encode_kind(tokenizer, views[rows], kind), strict=True))
    return [found[row] for row in range(len(views))]


def _encode_kind(tokenizer: Tokenizer, views: Tensor, soft: SoftSpec | None) -> list[Found]:
    found = _harden(tokenizer, views) if soft is None else _soften(tokenizer, views, soft)
    if len(found) != len(views):
        raise RuntimeError(f"{len(views)} views gave {len(found)} grids of token ids")
    return found


def _harden(tokenizer: Tokenizer, views: Tensor) -> list[Found]:
    ids = tokenizer.encode(views).flatten(1).cpu().numpy()
    return [Found(of_view) for of_view in ids.astype("<u2")]


def _soften(tokenizer: Tokenizer, views: Tensor, soft: SoftSpec) -> list[Found]:
    features = tokenizer.features(views)
    flat = features.reshape(-1, features.shape[-1])
    softened = soften(tokenizer.quantizer.stages[0], flat, soft)
    ids = softened.ids.reshape(len(views), -1, soft.top_k).astype("<u2", copy=False)
    shares = softened.stored.reshape(len(views), -1).astype("<f2", copy=False)
    return [
        # A copy: who keeps the nearest ids does not keep all the others with them.
        Found(of_view[:, 0].copy(), SoftIds(of_view.reshape(-1), probabilities))
        for of_view, probabilities in zip(ids, shares, strict=True)
    ]


def _encode_alone(tokenizer: Tokenizer, view: Tensor, soft: SoftSpec | None) -> Outcome:
    try:
        return _encode(tokenizer, view, [soft])[0]
    except Exception as exc:  # noqa: BLE001 - whatever it is, one caller gets it
        failure = TokenizerFailedError()
        failure.__cause__ = exc
        return failure
