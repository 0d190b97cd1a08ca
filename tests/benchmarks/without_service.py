"""What a service is measured against: the same tokenizer without one.

In processes that decode, crop and encode and do nothing else, and in a queue that is simulated.
"""

import heapq
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_builder.formats.codebook_header import PixelRule
from cache_builder.formats.views import centre_square
from cache_builder.imaging import apply_view, decode
from cache_builder.tokenizers import PatchTokenizer
from tokenizers_svc.cores import num_cores

NUM_CORES = num_cores()


def offline_rate(codebook: Path, photos: list[str], batch: int, seconds: float) -> float:
    """Return images per second of one process per core that decodes, crops and encodes."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(NUM_CORES)
    with spawn.Pool(NUM_CORES, _begin, (barrier, str(codebook))) as pool:
        tasks = [(photos, batch, seconds)] * NUM_CORES
        return float(sum(pool.starmap(_tokenize_for, tasks, chunksize=1)))


def bare_times(codebook: Path, photos: list[str], seconds: float) -> list[float]:
    """Return how long decoding and encoding takes in one thread, one by one, milliseconds."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, _begin, (spawn.Barrier(1), str(codebook))) as pool:
        times: list[float] = pool.apply(_time_each, (photos, seconds))
    return times


def ideal_queue(times_ms: list[float], rate: float) -> tuple[str, str]:
    """Return the median and the 99th percentile, ms, of a queue in front of one server per core.

    Pictures come as in the open loop and are served in that order, one by one, each in the time
    that it takes alone: what sizes and chance make of a service that costs nothing.
    """
    rng = random.Random(0)
    free_at = [0.0] * NUM_CORES
    now, latencies = 0.0, []
    for _ in range(100_000):
        now += 1000 * rng.expovariate(rate)
        ended = max(now, heapq.heappop(free_at)) + rng.choice(times_ms)
        heapq.heappush(free_at, ended)
        latencies.append(ended - now)
    return f"{np.percentile(latencies, 50):.2f}", f"{np.percentile(latencies, 99):.2f}"


def _begin(barrier: Any, codebook: str) -> None:
    torch.set_num_threads(1)
    _worker["tokenizer"] = PatchTokenizer.load(codebook)
    _worker["barrier"] = barrier


_worker: dict[str, Any] = {}  # of a process of the pool


def _tokenize_for(photos: list[str], batch: int, seconds: float) -> float:
    tokenizer: PatchTokenizer = _worker["tokenizer"]
    bodies = [Path(photo).read_bytes() for photo in photos]
    tokenizer.encode(torch.stack([cut(body, tokenizer.pixel_rule) for body in bodies[:batch]]))
    _worker["barrier"].wait()
    started, num_images = time.perf_counter(), 0
    while time.perf_counter() < started + seconds:
        chosen = [bodies[(num_images + i) % len(bodies)] for i in range(batch)]
        tokenizer.encode(torch.stack([cut(body, tokenizer.pixel_rule) for body in chosen]))
        num_images += batch
    return num_images / (time.perf_counter() - started)


def _time_each(photos: list[str], seconds: float) -> list[float]:
    tokenizer: PatchTokenizer = _worker["tokenizer"]
    bodies = [Path(photo).read_bytes() for photo in photos]
    end, times = time.perf_counter() + seconds, list[float]()
    while time.perf_counter() < end or len(times) < 10:
        body = bodies[len(times) % len(bodies)]
        started = time.perf_counter()
        tokenizer.encode(cut(body, tokenizer.pixel_rule)[None])
        times.append(1000 * (time.perf_counter() - started))
    return times[len(times) // 10 :]


def cut(body: bytes, rule: PixelRule) -> torch.Tensor:
    """Return the largest centred square of an image file, (3, S, S) uint8."""
    pixels = decode(body)
    height, width = pixels.shape[-2:]
    return apply_view(pixels, centre_square((height, width)), rule.size, rule.interpolation)
