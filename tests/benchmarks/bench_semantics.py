"""Print how well tokens of pixels and of a real encoder tell coarse classes of photographs.

Run: python tests/benchmarks/bench_semantics.py
"""

import sys
import tempfile
from pathlib import Path

import torch

from tests import semantics
from tests.places import DATA

PHOTOS = DATA / "photos"
WEIGHTS = DATA / "weights" / "mobilenetv2_100.same.fp16.safetensors"
VOCAB_SIZES = (64, 256, 512)


def main():
    for path in (PHOTOS, WEIGHTS):
        if not path.exists():
            print(f"skipped: {path} is not there; PATCHCACHE_TEST_DATA may name its folder")
            return
    torch.set_num_threads(1)  # on a busy machine threads wait for each other
    tokenizers = (
        ("pixels", semantics.pixel_options(), "l2"),
        ("mobilenetv2", semantics.mobilenet_options(WEIGHTS), "l2"),
        ("mobilenetv2", semantics.mobilenet_options(WEIGHTS), "cosine"),
    )
    names = [name for name in semantics.Scores._fields if name not in ("perplexity", "num_tokens")]
    print("value / shuffled labels; means of two halves")
    print("| tokens | metric | K | n | perplexity |", " | ".join(names), "|")
    print("|---" * (5 + len(names)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        halves = semantics.link_halves(PHOTOS, root)
        for k in VOCAB_SIZES:
            for name, options, metric in tokenizers:
                out = root / "codebook.safetensors"
                scores = semantics.measure(options, halves, k, out, metric=metric)
                cells = [f"{v:.3f} / {s:.3f}" for v, s in (getattr(scores, n) for n in names)]
                print(
                    f"| {name} | {metric} | {k} | {scores.num_tokens:,} | {scores.perplexity:.0f} "
                    f"| {' | '.join(cells)} |",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
