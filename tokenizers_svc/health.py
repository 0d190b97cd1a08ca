"""How a service is now, and whether it still works.

A device can hang without an error: a batch begins and never ends. The watchdog takes a model for
stuck when pictures wait for it and no batch has ended for 30 s; the service is then not ready, and
its process ends with the reason, because only a new one gets the device back.
"""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from tokenizers_svc.registry import Served

PATIENCE_S: Final = 30.0


class ModelState(NamedTuple):
    """How one model and its worker are now."""

    model: str
    fingerprint: str
    extractor: str
    vocab_size: int
    device: str
    is_alive: bool
    is_ready: bool
    num_waiting: int  # pictures that no batch has taken
    num_running: int  # pictures in a batch
    num_batches: int  # that have ended
    num_dropped: int  # pictures whose client had gone or whose deadline had passed
    busy_s: float  # of all threads, in batches, since the start


def state_of(served: "Served") -> ModelState:
    """Return how a model of a service is now."""
    stats = served.batcher.stats()
    return ModelState(
        model=served.name,
        fingerprint=served.fingerprint,
        extractor=served.codebook.extractor.id,
        vocab_size=served.codebook.vocab_size,
        device=str(served.device),
        is_alive=stats.num_lanes_alive > 0,
        is_ready=served.batcher.is_ready,
        num_waiting=stats.num_undecoded + stats.num_views,
        num_running=stats.num_running,
        num_batches=stats.num_batches,
        num_dropped=stats.num_late,
        busy_s=sum(stats.busy_s),
    )


class ServiceState(NamedTuple):
    """How a service is now."""

    is_ready: bool
    num_admitted: int
    kept_bytes: int
    kept_entries: int
    num_hits: int  # of kept answers
    num_misses: int
    models: tuple[ModelState, ...]


class Watchdog:
    """Notices models that have work and get nothing done."""

    def __init__(
        self, patience_s: float = PATIENCE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin.

        Args:
            patience_s: How long a model may go without an ended batch while pictures wait.
            clock: Seconds since some moment.
        """
        self._patience_s = patience_s
        self._clock = clock
        self._progress: dict[str, tuple[int, float]] = {}  # of models that had work: batches, when

    def complaint(self, models: Iterable[ModelState]) -> str | None:
        """Return what is wrong with a model, None when nothing is. Ask every few seconds."""
        now = self._clock()
        for state in models:
            num_batches, since = self._progress.get(state.model, (-1, now))
            has_work = state.num_waiting + state.num_running > 0
            if not has_work or not state.is_ready:
                self._progress.pop(state.model, None)  # its time begins when there is work
            elif num_batches != state.num_batches:
                self._progress[state.model] = (state.num_batches, now)
            elif now - since > self._patience_s:
                return (
                    f"The model {state.model} has ended no batch for {now - since:.0f} s while "
                    f"{state.num_waiting + state.num_running} pictures wait for it."
                )
        return None
