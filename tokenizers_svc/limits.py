"""What the service accepts, and how long it waits.

Every limit is applied before the thing that it limits is held: the number of pictures before a
body is read, the length of a body by its header and again while it arrives, the number of pixels
by the picture's own header. Memory is bounded by `max_queue` bodies of `max_body_bytes` and
`decode_threads` pictures of `max_pixels`.
"""

from typing import Self

from pydantic import BaseModel, Field

_BATCHES_IN_QUEUE = 4
_MAX_DECODE_THREADS = 8
_PILLOW_LIMIT = 178_956_970  # Pillow refuses more by itself, whatever it is told here


class Limits(BaseModel, frozen=True, extra="forbid"):
    """Limits of one service; 0 where a field says so is chosen for the machine."""

    max_body_bytes: int = Field(20_000_000, gt=0, description="of one request, bytes")
    max_pixels: int = Field(
        50_000_000, gt=0, le=_PILLOW_LIMIT, description="width x height of one picture"
    )
    max_queue: int = Field(
        0, ge=0, description="pictures admitted and not yet answered; 0: four batches"
    )
    max_batch: int = Field(
        0, ge=0, description="pictures in one run of the tokenizer; 0: 32, on a CPU 8"
    )
    linger_s: float = Field(
        0.002,
        ge=0,
        le=0.1,
        description="how long a batch that is not full waits for more, seconds; it waits only "
        "when the batch before it held more than one picture",
    )
    decode_threads: int = Field(
        0, ge=0, description="pictures decoded at once; 0: one per core, at most eight"
    )
    request_deadline_s: float = Field(
        30.0, gt=0, description="from admission to answer, seconds; then 504"
    )
    body_timeout_s: float = Field(
        15.0, gt=0, description="for the whole body to arrive, seconds; then 408"
    )
    drain_s: float = Field(
        1.0,
        ge=0,
        description="how long a service that was told to stop is not ready and still serves, "
        "seconds; longer than a load balancer takes to notice",
    )

    def resolved(self, *, on_cpu: bool, num_cores: int) -> Self:
        """Return the same limits with every 0 replaced by its value on this machine."""
        max_batch = self.max_batch or (8 if on_cpu else 32)
        return self.model_copy(
            update={
                "max_batch": max_batch,
                "max_queue": self.max_queue or _BATCHES_IN_QUEUE * max_batch,
                "decode_threads": self.decode_threads or min(num_cores, _MAX_DECODE_THREADS),
            }
        )
