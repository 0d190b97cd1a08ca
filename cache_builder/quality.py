"""What a codebook is worth: how much of it is used, and how well it stands for the pixels."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Usage(NamedTuple):
    """How evenly the token ids of a sample are spread. Depends on n: compare at equal n only."""

    num_tokens: int
    vocab_size: int
    num_used: int  # ids that occur at all
    entropy_bits: float
    perplexity: float  # 2 ** entropy; K for a uniform spread
    max_share: float  # of the most frequent id


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


def psnr(mean_squared_error: float) -> float:
    """Return the peak signal-to-noise ratio, dB, of an error per value on the 0..255 scale."""
    return math.inf if mean_squared_error == 0 else 10 * math.log10(255**2 / mean_squared_error)
