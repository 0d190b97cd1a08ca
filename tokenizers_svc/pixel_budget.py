"""How many pixels are in decoders at one moment.

A decoded picture takes 3 to 9 bytes a pixel until its view has been cut out, and files of a few
kilobytes may hold the most that is allowed. Threads that decode wait here for room; one picture
that is larger than all the room is decoded alone.
"""

import contextlib
import threading
from collections.abc import Iterator


class PixelBudget:
    """Room for so many pixels, shared by threads."""

    def __init__(self, max_pixels: int) -> None:
        """Open with all the room."""
        self._max_pixels = max_pixels
        self._num_pixels = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def room_for(self, num_pixels: int) -> Iterator[None]:
        """Hold room for a picture; waits until there is some."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(num_pixels))
            self._num_pixels += num_pixels
        try:
            yield
        finally:
            with self._changed:
                self._num_pixels -= num_pixels
                self._changed.notify_all()

    def _has_room(self, num_pixels: int) -> bool:
        return not self._num_pixels or self._num_pixels + num_pixels <= self._max_pixels
