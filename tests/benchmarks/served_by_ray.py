"""The accelerator behind Ray Serve, on a Ray of its own, which ends with it.

python -m tests.benchmarks.served_by_ray PORT
"""

import asyncio
import signal
import sys
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from tests.benchmarks.accelerator import MAX_BATCH, NUM_PATCHES, WAIT_S, wait_for_device


@serve.deployment(max_ongoing_requests=8 * MAX_BATCH)
class Tokenizer:
    """Bodies in, token ids out, in batches."""

    def __init__(self) -> None:
        """Have one device, for one batch at a time."""
        self._device = asyncio.Lock()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_S)
    async def encode(self, bodies: list[bytes]) -> list[list[int]]:
        """Run a batch on the device."""
        async with self._device:
            await asyncio.to_thread(wait_for_device, len(bodies))
        return [[0] * NUM_PATCHES for _ in bodies]

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer one request."""
        return {"token_ids": await self.encode(await request.body())}


if __name__ == "__main__":
    # What replicas log is not sent here: that would take CPU time for every request.
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
        serve.run(Tokenizer.bind(), route_prefix="/v1/tokenize", blocking=True)
    finally:
        serve.shutdown()
        ray.shutdown()
