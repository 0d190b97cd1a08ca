"""Reading ahead: the next items are made in a thread while this one is worked on."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import TypeVar

_S = TypeVar("_S")
_T = TypeVar("_T")

_POLL_S = 0.1


def read_ahead(items: Iterable[_T], depth: int) -> Iterator[_T]:
    """Yield `items` in order, up to `depth` of them made ahead in a thread.

    It pays where making an item releases the interpreter's lock, as decoding does. What making one
    raises is raised here. When the caller stops early, so does the thread.
    """
    waiting: queue.Queue[tuple[_T] | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def offer(item: tuple[_T] | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not offer((item,)):
                    return
        except BaseException as exc:  # noqa: BLE001  it is raised where the items are wanted
            offer(exc)
        else:
            offer(None)
        finally:
            if isinstance(items, Generator):
                items.close()  # what it holds open is closed now, not some time later

    thread = threading.Thread(target=make, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (got := waiting.get()) is not None:
            if isinstance(got, BaseException):
                raise got
            yield got[0]
    finally:
        stopped.set()
        thread.join()


def map_ahead(
    function: Callable[[_S], _T],
    items: Iterable[_S],
    depth: int,
    *,
    executor: Executor | None = None,
) -> Iterator[_T]:
    """Yield `function(item)` of every item in order, up to `depth` of them made ahead in threads.

    It pays where the function waits for a network or releases the interpreter's lock. What it
    raises is raised here, in the item's turn. Results that nobody takes any more are dropped.

    Args:
        function: Called in the threads.
        items: Gone through in this thread.
        depth: How many results are made ahead.
        executor: What has the threads, and outlives the call; None is one of `depth` threads.
    """
    if executor is None:
        with ThreadPoolExecutor(depth, "map-ahead") as own:
            yield from map_ahead(function, items, depth, executor=own)
        return
    waiting: deque[Future[_T]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        wait([future for future in waiting if not future.cancel()])
