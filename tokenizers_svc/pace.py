"""How long a batch takes, learned from the last ones: seconds = a + b * n.

The two are a weighted least-squares line through the batches so far, in which every batch counts
less the longer ago it was. Batches of one size alone cannot tell `a` from `b`; all of the time then
counts as `b`, which overestimates small batches and never a full one.
"""

from dataclasses import dataclass

_SMOOTHING = 0.1


@dataclass(slots=True)
class Pace:
    """Exponentially weighted moments of sizes and seconds."""

    _size: float = 0.0
    _seconds: float = 0.0
    _size_square: float = 0.0
    _product: float = 0.0
    _is_new: bool = True

    def learn(self, num_pictures: int, seconds: float) -> None:
        """Take one more batch into account."""
        weight = 1.0 if self._is_new else _SMOOTHING
        self._is_new = False
        self._size += weight * (num_pictures - self._size)
        self._seconds += weight * (seconds - self._seconds)
        self._size_square += weight * (num_pictures**2 - self._size_square)
        self._product += weight * (num_pictures * seconds - self._product)

    @property
    def per_picture_s(self) -> float:
        """Seconds that one more picture adds to a batch: b."""
        if self._is_new:
            return 0.0
        spread = self._size_square - self._size**2
        most = self._seconds / self._size
        if spread < 1e-6 * self._size_square:
            return most
        slope = (self._product - self._size * self._seconds) / spread
        return min(max(slope, 0.0), most)

    @property
    def per_batch_s(self) -> float:
        """Seconds that a batch takes however few it holds: a."""
        return max(0.0, self._seconds - self.per_picture_s * self._size)

    def predict(self, num_pictures: int, max_batch: int) -> float:
        """Return how long so many pictures take in batches of at most `max_batch`, seconds."""
        num_batches = -(-num_pictures // max_batch)
        return num_batches * self.per_batch_s + num_pictures * self.per_picture_s
