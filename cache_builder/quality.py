"""What a codebook is worth without labels: how it is used, how near it comes, what neighbours do.

Every measure here is a pure function of counts, distances or token ids. Measures of use depend on
how many tokens were looked at; compare them at equal numbers only.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NEAR_TIE = 1e-4  # share of the distance; `verify` allows an id to differ within the same margin
_RARE = 0.1  # of the even spread


class Usage(NamedTuple):
    """How evenly the token ids of a sample are spread. Depends on n: compare at equal n only."""

    num_tokens: int
    vocab_size: int
    num_used: int  # ids that occur at all
    entropy_bits: float
    perplexity: float  # 2 ** entropy; K for a uniform spread
    max_share: float  # of the most frequent id


class Idle(NamedTuple):
    """How many centroids do little or nothing."""

    num_dead: int  # no token
    num_single: int  # one token
    num_rare: int  # fewer than a tenth of n / K tokens, the dead ones included


class Agreement(NamedTuple):
    """How often neighbouring patches have one id. A share is NaN where there are no neighbours."""

    horizontal: float
    vertical: float
    shuffled: float  # expected of either when the ids of every image are shuffled in place


def usage(counts: NDArray[np.int64]) -> Usage:
    """Measure the spread of token counts (K,), one number per id."""
    total = int(counts.sum())
    shares = counts[counts > 0] / max(total, 1)
    entropy = float(-(shares * np.log2(shares)).sum())
    return Usage(
        num_tokens=total,
        vocab_size=len(counts),
        num_used=len(shares),
        entropy_bits=entropy,
        perplexity=2**entropy,
        max_share=float(shares.max(initial=0.0)),
    )


def idle(counts: NDArray[np.int64]) -> Idle:
    """Count the centroids with few tokens in counts (K,)."""
    even = counts.sum() / len(counts)
    num_dead = int((counts == 0).sum())
    return Idle(
        num_dead=num_dead,
        num_single=int((counts == 1).sum()),
        num_rare=max(int((counts < _RARE * even).sum()), num_dead),
    )


def psnr(mean_squared_error: float) -> float:
    """Return the peak signal-to-noise ratio, dB, of an error per value on the 0..255 scale."""
    return math.inf if mean_squared_error == 0 else 10 * math.log10(255**2 / mean_squared_error)


def near_ties(
    nearest: NDArray[Any],  # (n,) squared distances to the nearest centroid
    second: NDArray[Any],  # (n,) to the second nearest
) -> tuple[int, int]:
    """Count patches whose id hangs on little.

    Returns:
        Patches whose second distance exceeds the first by at most 1e-4 of the second, exact ties
        included, and exact ties. Of integer distances an exact tie is one in truth; the lowest id
        wins it.
    """
    first, other = nearest.astype(np.float64), second.astype(np.float64)
    near = other - first <= NEAR_TIE * np.maximum(other, 1e-12)
    return int(near.sum()), int((nearest == second).sum())


def neighbour_agreement(token_ids: NDArray[Any]) -> Agreement:
    """Measure how often horizontal and vertical neighbours have one id.

    The value for shuffled positions is exact, no shuffle is drawn: two patches picked from an image
    whose id j occurs n_j times among N have one id with probability sum n_j (n_j - 1) / N (N - 1).
    So it holds what the mix of ids in an image explains, and the rest is where they lie.

    Args:
        token_ids: (B, rows, cols), integers.
    """
    horizontal = token_ids[:, :, 1:] == token_ids[:, :, :-1]
    vertical = token_ids[:, 1:] == token_ids[:, :-1]
    num_patches = token_ids.shape[1] * token_ids.shape[2]
    num_pairs = len(token_ids) * num_patches * (num_patches - 1)
    # In sorted rows equal ids are runs.
    ordered = np.sort(token_ids.reshape(len(token_ids), num_patches), axis=1)
    begins = np.ones(ordered.shape, bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    runs = np.diff(np.append(np.flatnonzero(begins), ordered.size))
    shuffled = float((runs * (runs - 1)).sum()) / num_pairs if num_pairs else math.nan
    return Agreement(_mean(horizontal), _mean(vertical), shuffled)


def mean_agreement(parts: Sequence[tuple[int, Agreement]]) -> Agreement:
    """Return the agreement of several sets of images of one grid, each with its number of images.

    Raises:
        ValueError: There are no images.
    """
    total = sum(num_images for num_images, _ in parts)
    if not total:
        raise ValueError("no images have no agreement")
    columns = zip(*(agreement for _, agreement in parts), strict=True)
    sizes = [num_images for num_images, _ in parts]
    return Agreement(
        *(
            math.fsum(n * v for n, v in zip(sizes, column, strict=True)) / total
            for column in columns
        )
    )


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if values.size else math.nan
