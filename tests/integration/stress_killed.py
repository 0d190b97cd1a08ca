"""Disturb many builds at random moments and print what came of each: for long runs by hand.

python -m tests.integration.stress_killed --rounds 100
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.integration import builds, cluster


def describe(moments: list[cluster.Moment]) -> str:
    return " ".join(f"{moment.kind}@{moment.progress}" for moment in moments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no round after these")
    options = parser.parse_args()
    started_s = time.monotonic()
    total = Counter[str]()
    with tempfile.TemporaryDirectory(prefix="stress") as name:
        folder = Path(name)
        images = builds.write_images(folder / "images", size=(800, 600))
        codebooks = builds.write_codebooks(folder)
        expected = {}
        raylets = cluster.Raylets()
        print(
            f"{'round':>5} {'layout':<10} {'codebooks':>9} {'runs':>4} {'seconds':>7}  same  what"
        )
        try:
            for number in range(options.rounds):
                if time.monotonic() - started_s > 60 * options.minutes:
                    break
                rng = random.Random(f"{options.seed} {number}")
                layout = ("webdataset", "zarr")[number % 2]
                count = rng.choice((1, 2))
                settings = builds.options_of(
                    images, codebooks[:count], folder / f"{number}", layout=layout, num_views=16
                )
                if (layout, count) not in expected:
                    alone = settings._replace(out=folder / f"alone-{layout}-{count}")
                    builds.build_here(alone)
                    expected[layout, count] = builds.contents(alone.out)
                kinds = rng.choices(cluster.KINDS, k=rng.randint(2, 5))
                moments = cluster.draw_moments(rng, kinds)
                begun_s = time.monotonic()
                story = cluster.disturb(
                    builds.words_of(settings), settings.out, raylets, moments, rng,
                    folder / f"{number}.log",
                )  # fmt: skip
                same = builds.contents(settings.out) == expected[layout, count]
                seconds = time.monotonic() - begun_s
                print(
                    f"{number:>5} {layout:<10} {count:>9} {story.num_runs:>4} {seconds:>7.0f}  "
                    f"{'yes' if same else 'NO':<4}  {describe(story.happened)}",
                    flush=True,
                )
                total.update(moment.kind for moment in story.happened)
                total["builds"] += 1
                total["different"] += not same
        finally:
            raylets.stop()
    print(", ".join(f"{count} {what}" for what, count in total.items()))


if __name__ == "__main__":
    main()
