"""What a service cannot do without: the body, the batcher and an answer, on bare sockets.

    python -m tests.benchmarks.served_bare CODEBOOK

No limits, no keys, no log, no metrics, no other routes, no other forms, no errors. What it reaches
is the most that a service in front of this batcher can reach while its client shares the cores.
"""

import asyncio
import gc
import re
import sys
from typing import cast

import torch
from pydantic_core import to_json
from torch import Tensor

from cache_builder.tokenizers import PatchTokenizer
from tokenizers_svc.batcher import Batcher
from tokenizers_svc.cores import num_cores
from tokenizers_svc.decoding import make_view
from tokenizers_svc.limits import Limits
from tokenizers_svc.pending import Crew
from tokenizers_svc.pixel_budget import PixelBudget

try:
    from uvloop import run
except ImportError:
    from asyncio import run

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_ANSWER = b"HTTP/1.1 200 OK\r\nX-Batch-Size: %d\r\nContent-Length: %d\r\n\r\n%b"


class Service:
    """A tokenizer and its batcher."""

    def __init__(self, codebook: str) -> None:
        """Load."""
        limits = Limits().resolved(on_cpu=True, num_cores=num_cores())
        self.budget, self.max_pixels = PixelBudget(limits.max_decoding_pixels), limits.max_pixels
        self.tokenizer = PatchTokenizer.load(codebook)
        crew = Crew.for_device(torch.device("cpu"), num_lanes=limits.lanes, num_decoders=0)
        self.batcher = Batcher(lambda: self.tokenizer, max_batch=limits.max_batch, crew=crew)

    async def answer(self, body: bytes) -> bytes:
        """Return the answer to a picture."""

        def cut() -> Tensor:
            rule = self.tokenizer.pixel_rule
            return make_view(body, None, rule, self.max_pixels, self.budget).pixels

        found = await self.batcher.tokenize(cut)
        content = to_json({"token_ids": found.ids.tolist()})
        return _ANSWER % (found.batch_size, len(content), content)


class Connection(asyncio.Protocol):
    """One request after another; what has no body is answered with nothing."""

    def __init__(self, service: Service) -> None:
        """Wait for a connection."""
        self._service = service
        self._received = bytearray()
        self._start = self._end = 0  # of the body that is being read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Collect a request."""
        self._received += data
        if not self._end:
            self._start = self._received.find(b"\r\n\r\n") + 4
            if self._start < 4:
                return
            length = _LENGTH.search(self._received, 0, self._start)
            self._end = self._start + (int(length[1]) if length else 0)
        if len(self._received) < self._end:
            return
        body = bytes(self._received[self._start : self._end])
        self._received.clear()
        self._end = 0
        if body:
            self._work = asyncio.get_running_loop().create_task(self._answer(body))
        else:
            self._transport.write(_ANSWER % (0, 0, b""))

    async def _answer(self, body: bytes) -> None:
        self._transport.write(await self._service.answer(body))


async def serve(codebook: str) -> None:
    """Answer until the process is ended."""
    service = Service(codebook)
    torch.set_num_threads(1)
    service.batcher.start()
    while not service.batcher.is_ready:
        await asyncio.sleep(0.05)
    gc.collect()
    gc.freeze()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(service), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    print(f"try: curl http://127.0.0.1:{port}/", file=sys.stderr, flush=True)
    await loop.create_future()


if __name__ == "__main__":
    run(serve(sys.argv[1]))
