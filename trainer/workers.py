"""Processes that read data ahead for the trainer.

Workers come from a fork server: forking a process that has used torch's threads can hang, and
spawning pays the import of torch in every worker.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from cache_builder.errors import PatchCacheError

B_co = TypeVar("B_co", covariant=True)
T = TypeVar("T")


class Dataset(Protocol[B_co]):
    """What reads batches; it is sent to every worker."""

    def read(self, places: Any, /) -> B_co:
        """Return the batch at these places."""


def load_ahead(
    dataset: Dataset[T], batches: Iterable[Any], *, num_workers: int, device: torch.device
) -> Generator[T]:
    """Yield `dataset.read(places)` of every element of `batches`, in order.

    Workers live until the iterator ends or is closed; they read ahead by two batches each. Tensors
    are in pinned memory for a CUDA device.

    Raises:
        PatchCacheError: The dataset raises one.
    """
    context = None
    if num_workers > 0:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([type(dataset).__module__])
    loader = DataLoader(
        _Reader(dataset),
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        multiprocessing_context=context,
        pin_memory=device.type == "cuda",
        worker_init_fn=_belong_to_the_main_process,
        # The workers' seed; without its own generator it would be drawn from the model's.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, PatchCacheError):
            raise batch
        yield batch


class _Reader:
    """A dataset as torch asks it, in a worker.

    An error that a user can mend is returned, not raised: torch would hide its message in the
    traceback of the worker.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, places: Any) -> Any:
        try:
            return self._dataset.read(places)
        except PatchCacheError as exc:
            return exc


def _as_it_is(batch: Any) -> Any:
    return batch


def _belong_to_the_main_process(worker: int) -> None:
    """Leave signals to the main process, and end with it, however it ends.

    A terminal sends Ctrl-C to every process; a worker that dies of it would take the last step with
    it. And torch's own watchdog asks whether the worker's parent has changed; that is the fork
    server, which lives as long as a worker does: of a main process that was killed, both stayed.

    Args:
        worker: Its number, which torch passes.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)
