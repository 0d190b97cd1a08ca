"""What the service accepts, and how long it waits.

Every limit is applied before the thing that it limits is held: the number of pictures before a
body is read, the length of a body by its header and again while it arrives, the number of pixels
by the picture's own header. Memory is bounded by `max_held_bytes` of bodies, `max_decoding_pixels`
of pictures and `max_queue` resized views, whatever clients do.

The defaults are meant for the open internet; `GET /v1/models` shows those in force.
"""

from typing import Self

from pydantic import BaseModel, Field

_BATCHES_IN_QUEUE = 4
_MAX_DECODE_THREADS = 8
_LINGER_S = 0.002
_PILLOW_LIMIT = 178_956_970  # Pillow refuses more by itself, whatever it is told here


class Limits(BaseModel, frozen=True, extra="forbid"):
    """Limits of one service; 0 where a field says so is chosen for the machine."""

    max_body_bytes: int = Field(
        20_000_000, gt=0, description="of one request with one picture, bytes"
    )
    max_batch_body_bytes: int = Field(
        64_000_000, gt=0, description="of one request with several pictures, bytes"
    )
    max_held_bytes: int = Field(
        512_000_000,
        gt=0,
        description="of the bodies of all requests that are not answered yet, bytes",
    )
    max_pixels: int = Field(
        50_000_000, gt=0, le=_PILLOW_LIMIT, description="width x height of one picture"
    )
    max_batch_pixels: int = Field(
        256_000_000, gt=0, description="width x height of all pictures of one request together"
    )
    max_decoding_pixels: int = Field(
        128_000_000,
        gt=0,
        description="width x height of all pictures that are decoded at one moment; a larger one "
        "is decoded alone",
    )
    max_items: int = Field(
        64, gt=0, description="pictures of one request; no more than max_queue has places for"
    )
    max_soft_top_k: int = Field(64, ge=2, description="centroids per patch of soft targets")
    max_queue: int = Field(
        0,
        ge=0,
        description="pictures admitted and not yet answered; 0: four batches, at least max_items",
    )
    max_queue_wait_s: float = Field(
        1.0,
        gt=0,
        description="pictures are refused while those admitted before are expected to take "
        "longer, seconds",
    )
    max_batch: int = Field(
        0, ge=0, description="pictures in one run of the tokenizer; 0: 32, on a CPU 8"
    )
    linger_s: float | None = Field(
        None,
        ge=0,
        le=0.1,
        description="how long a batch that is not full waits for more, seconds; it waits only "
        "when the batch before it held more than one picture; null: 0.002, on a CPU 0",
    )
    lanes: int = Field(
        0,
        ge=0,
        description="on a CPU, threads that decode and tokenise, each with a batch of its own; "
        "0: one per core",
    )
    decode_threads: int = Field(
        0,
        ge=0,
        description="beside a GPU, pictures decoded at once; 0: one per core, at most eight",
    )
    request_deadline_s: float = Field(
        30.0, gt=0, description="from admission to answer, seconds; then 504"
    )
    body_timeout_s: float = Field(
        15.0, gt=0, description="for the whole body to arrive, seconds; then 408"
    )
    header_timeout_s: float = Field(
        10.0, gt=0, description="for the whole head of a request to arrive, seconds; then 408"
    )
    send_timeout_s: float = Field(
        30.0,
        gt=0,
        description="how long a client may take nothing of its answer, seconds; then closed",
    )
    keep_alive_s: float = Field(
        75.0,
        gt=0,
        description="how long a connection may be idle, seconds; more than the 60 s of the usual "
        "proxies",
    )
    max_header_bytes: int = Field(
        65_536, ge=1024, description="of the head of one request, bytes; then 431"
    )
    max_connections: int = Field(
        1024,
        gt=0,
        description="open at one moment; then the longest idle one is closed, or the new gets 503",
    )
    kept_bytes: int = Field(
        64_000_000, ge=0, description="of answers kept for pictures that come again, bytes; 0: none"
    )
    drain_s: float = Field(
        1.0,
        ge=0,
        description="how long a service that was told to stop is not ready and still serves, "
        "seconds; longer than a load balancer takes to notice",
    )

    def resolved(self, *, on_cpu: bool, num_cores: int) -> Self:
        """Return the same limits with every 0 replaced by its value on this machine.

        What could never be admitted is mended too: `max_items` is at most `max_queue`, and
        `max_held_bytes` has room for the largest body.
        """
        max_batch = self.max_batch or (8 if on_cpu else 32)
        max_queue = self.max_queue or max(_BATCHES_IN_QUEUE * max_batch, self.max_items)
        return self.model_copy(
            update={
                "max_batch": max_batch,
                "linger_s": self._linger_s(on_cpu=on_cpu),
                "lanes": (self.lanes or num_cores) if on_cpu else 1,
                "max_queue": max_queue,
                "max_items": min(self.max_items, max_queue),
                "max_held_bytes": max(
                    self.max_held_bytes, self.max_body_bytes, self.max_batch_body_bytes
                ),
                "decode_threads": self.decode_threads or min(num_cores, _MAX_DECODE_THREADS),
            }
        )

    def _linger_s(self, *, on_cpu: bool) -> float:
        if self.linger_s is not None:
            return self.linger_s
        # Batches gain next to nothing on a CPU, and the wait costs every picture in them.
        return 0.0 if on_cpu else _LINGER_S
