"""The services that `bench_serve.py` measures, each in a process of its own.

    python -m tests.benchmarks.served ours CODEBOOK        ours, on the CPU
    python -m tests.benchmarks.served device               ours, on a simulated accelerator
    python -m tests.benchmarks.served_bare CODEBOOK        next to nothing, on the CPU
    python -m tests.benchmarks.served_by_litserve PORT     a peer, on the same accelerator
    python -m tests.benchmarks.served_by_ray PORT

The accelerator takes 5 + 0.2 n ms for a batch of n, one batch at a time, and no CPU. Nothing is
decoded in front of it, here or by the peers: it is the batching that is compared.
"""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec, PixelRule
from tests.benchmarks.accelerator import wait_for_device
from tokenizers_svc import logs


class Accelerator:
    """A tokenizer that waits and computes nothing."""

    device = torch.device("cuda")  # by name: nothing is moved there

    def __init__(self) -> None:
        """Have the grid of a usual tokenizer."""
        centroids = np.zeros((1, 2, 768), np.uint8)
        rule = PixelRule(size=224, patch_size=16)
        counts = np.ones((1, 2), np.int64)
        extractor = ExtractorSpec(id="pixel")
        self.codebook = Codebook(
            centroids, counts, metric="l2", pixel_rule=rule, extractor=extractor
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Keep the device busy for a batch; return zeros."""
        wait_for_device(len(pixels))
        return torch.zeros(len(pixels), 14, 14, dtype=torch.int64)


def serve_ours(codebook: Any) -> None:
    """Serve a codebook, or a loaded tokenizer."""
    from tokenizers_svc.app import create_app
    from tokenizers_svc.limits import Limits
    from tokenizers_svc.serve import run_app

    # Nothing is kept: the same photographs come again and again. Nothing is refused for waiting:
    # a closed loop has as many requests under way as it wants.
    limits = Limits(kept_bytes=0, drain_s=0, max_queue=512, max_queue_wait_s=60)
    run_app(create_app(codebook, limits=limits), port=0)


def serve_device() -> None:
    """Serve the accelerator with our batcher, every picture being the same grey one."""
    from cache_builder.imaging import EncodedImage

    grey = torch.full((3, 224, 224), 128, dtype=torch.uint8)
    EncodedImage.decode = lambda image: grey
    serve_ours(Accelerator())


def main() -> None:
    """Serve what the arguments say until SIGTERM."""
    logs.configure("json")  # as `patchcache serve` does where nobody looks on
    kind, *rest = sys.argv[1:]
    if kind == "ours":
        serve_ours(rest[0])
    else:
        serve_device()


if __name__ == "__main__":
    main()
