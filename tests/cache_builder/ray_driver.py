"""A job whose units only wait, as a driver of its own: a process is in one cluster at a time.

Called with the address of the cluster and settings as JSON; prints one JSON line per unit. The
worker is pickled by value, as `__main__` is not on the nodes: what they know of `cache_builder`
came with the job.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

from cache_builder import ray_cluster, ray_pool
from cache_builder.cli_errors import one_line_errors
from cache_builder.ray_cluster import ClusterOptions
from cache_builder.ray_jobs import map_units

SETTINGS = {
    "num_units": 10, "seconds": 0.2, "workers": None, "poison": [], "patience": 20,
    "gpus": 0, "at_once": 1, "hungry": [], "tries": 4, "hurry": "", "kernels": False,
}  # fmt: skip
OF_A_WORKER = ("seconds", "poison", "hungry", "hurry", "kernels")
BITE_BYTES = 50 << 20  # of a hungry unit, where memory is short


class Waits:
    def __init__(self, seconds, poison, hungry, hurry, kernels):
        self.seconds, self.poison, self.hungry = seconds, poison, hungry
        self.hurry = hurry  # a path: once something lies there, units do not wait any more
        self.kernels = kernels  # whether to look for them, which takes torch and its seconds

    def run(self, unit):
        import ray

        import cache_builder

        if unit in self.poison:
            os.kill(os.getpid(), 11)
        if unit in self.hungry and "RAY_memory_usage_threshold" in os.environ:
            held = []
            while len(held) < 200:
                held.append(b"x" * BITE_BYTES)
                time.sleep(0.05)
        before_s = time.time()
        logging.getLogger("cache_builder.waits").warning("skipped image of unit %d", unit)
        if not (self.hurry and Path(self.hurry).exists()):
            time.sleep(self.seconds)
        return {
            "unit": unit,
            "pid": os.getpid(),
            "package": str(Path(cache_builder.__file__).parent),
            "has_kernels": self.kernels and has_kernels(),
            "gpus": ray.get_runtime_context().get_accelerator_ids()["GPU"],
            "span": (before_s, time.time()),
        }


def has_kernels():
    from cache_builder.tokenizers.kernels.library import kernels

    return kernels() is not None


def main(address, settings):
    logging.basicConfig(format="%(message)s")
    # Ray looks for modules where the driver does, which on other machines finds nothing.
    sys.path.remove(os.environ["PYTHONPATH"])
    ray_cluster._HEAD_PATIENCE_S = settings["patience"]
    ray_pool._MAX_TRIES = settings["tries"]
    finished = map_units(
        lambda: Waits(**{name: settings[name] for name in OF_A_WORKER}),
        range(settings["num_units"]),
        ClusterOptions(address, settings["workers"], settings["gpus"]),
        job="waiting",
        at_once=settings["at_once"],
        count=lambda result: {"images": 3},
    )
    for result, node, seconds in finished:
        line = json.dumps({**result, "node": node, "seconds": seconds})
        sys.__stdout__.write(line + "\n")
        sys.__stdout__.flush()


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1], SETTINGS | json.loads(sys.argv[2]))
