"""The door: how many pictures and bytes may be inside at once.

A picture takes its place before its body is read and keeps it until it is answered or its client
has gone; a body counts with the length that it announces, or with what has arrived of it. So a
refusal costs nothing, and what is held behind the door is bounded whatever clients do.

The places of a request are those of one picture until the body tells of more. Refused is also what
would wait too long: the pictures inside, decoded or not, times what one took lately.

All of it happens in the event loop; nothing here is locked.
"""

import math
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tokenizers_svc.limits import Limits
from tokenizers_svc.problems import ProblemError

_MAX_RETRY_AFTER_S = 60


class Place:
    """What one request holds of the service; leaving the `with` block gives all of it back."""

    def __init__(self, door: "Door", on_leaving: Callable[[], None]) -> None:
        """Hold nothing yet."""
        self._door = door
        self._on_leaving = on_leaving
        self._num_pictures = 0
        self._num_bytes = 0

    def hold_pictures(self, num_pictures: int) -> None:
        """Hold places for so many pictures in all.

        Raises:
            ProblemError: 429, there are not enough; those held before stay held.
        """
        self._door.take_pictures(num_pictures - self._num_pictures)
        self._num_pictures = num_pictures

    def hold_bytes(self, num_bytes: int) -> None:
        """Hold room for a body of so many bytes in all.

        Raises:
            ProblemError: 429, there is not enough.
        """
        self._door.take_bytes(num_bytes - self._num_bytes)
        self._num_bytes = num_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.hold_pictures(0)
        self.hold_bytes(0)
        self._on_leaving()


class Door:
    """Counts what is inside and refuses what does not fit."""

    def __init__(self, limits: Limits, seconds_per_picture: Callable[[], float]) -> None:
        """Open.

        Args:
            limits: Resolved: `max_queue`, `max_queue_wait_s` and `max_held_bytes` are used.
            seconds_per_picture: What a picture costs the tokenizer, judging by the last ones.
        """
        self._limits = limits
        self._seconds_per_picture = seconds_per_picture
        self.num_pictures = 0
        self.num_bytes = 0

    @property
    def expected_wait_s(self) -> float:
        """How long the pictures inside will take, seconds."""
        return self.num_pictures * self._seconds_per_picture()

    def admit(self, *, num_bytes: int = 0, on_leaving: Callable[[], None] = lambda: None) -> Place:
        """Return a place for one picture, in a body that announces so many bytes.

        Args:
            num_bytes: Of the body.
            on_leaving: Called when the place has been given back.

        Raises:
            ProblemError: 429, with the limit that was passed and a Retry-After.
        """
        wait_s, limit_s = self.expected_wait_s, self._limits.max_queue_wait_s
        if wait_s > limit_s:
            raise self._overloaded(
                f"The pictures before yours are expected to take {wait_s:.1f} s, more than the "
                f"{limit_s:g} s that one may wait.",
                limit=limit_s,
                actual=round(wait_s, 3),
            )
        place = Place(self, on_leaving)
        place.hold_pictures(1)
        try:
            place.hold_bytes(num_bytes)
        except ProblemError:
            place.hold_pictures(0)
            raise
        return place

    def take_pictures(self, num_pictures: int) -> None:
        """Count further pictures in, or out if negative.

        Raises:
            ProblemError: 429, they are too many; nothing has been counted.
        """
        wanted = self.num_pictures + num_pictures
        if num_pictures > 0 and wanted > self._limits.max_queue:
            raise self._overloaded(
                f"The service has its {self.num_pictures} pictures and takes "
                f"{self._limits.max_queue} at once.",
                limit=self._limits.max_queue,
                actual=wanted,
            )
        self.num_pictures = wanted

    def take_bytes(self, num_bytes: int) -> None:
        """Count further bytes of bodies in, or out if negative.

        Raises:
            ProblemError: 429, they are too many; nothing has been counted.
        """
        wanted = self.num_bytes + num_bytes
        if num_bytes > 0 and wanted > self._limits.max_held_bytes:
            raise self._overloaded(
                f"The bodies being read have {self.num_bytes:,} bytes and may have "
                f"{self._limits.max_held_bytes:,} together.",
                limit=self._limits.max_held_bytes,
                actual=wanted,
            )
        self.num_bytes = wanted

    def _overloaded(self, reason: str, *, limit: float, actual: float) -> ProblemError:
        seconds = min(_MAX_RETRY_AFTER_S, max(1, math.ceil(self.expected_wait_s)))
        return ProblemError(
            "overloaded",
            f"{reason} Ask again after {seconds} s.",
            limit=limit,
            actual=actual,
            headers={"Retry-After": str(seconds)},
        )
