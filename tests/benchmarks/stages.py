"""Where the time of a piece of code goes: functions are wrapped, and each is charged its own time.

A function is found wherever a module of this project holds it, so what is measured is the code as
it runs. What a wrapped function calls is charged to the callee if that is wrapped too.
"""

import contextlib
import functools
import inspect
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """Functions that are charged to one account."""

    name: str
    functions: tuple[tuple[Any, str], ...]  # (module or class, attribute)


class Spent(NamedTuple):
    """Seconds of an account."""

    cpu_s: float
    wall_s: float


class StageClock:
    """Accounts of CPU and wall time by stage, over all threads of this process."""

    def __init__(self) -> None:
        self.totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._local = threading.local()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def watching(self, stages: list[Stage]) -> Iterator[None]:
        """Wrap the functions, and put them back afterwards."""
        undo: list[tuple[Any, str, Any]] = []
        for stage in stages:
            for owner, attribute in stage.functions:
                original = inspect.getattr_static(owner, attribute)
                wrapped = self._wrapped(stage.name, original)
                for holder in _holders(owner, attribute, original):
                    undo.append((holder, attribute, original))
                    setattr(holder, attribute, wrapped)
        try:
            yield
        finally:
            for holder, attribute, original in undo:
                setattr(holder, attribute, original)

    def spent(self, stage: str) -> Spent:
        """Return what one account holds."""
        return Spent(*self.totals[stage])

    def _wrapped(self, stage: str, original: Any) -> Any:
        if isinstance(original, classmethod):
            return classmethod(self._wrapped(stage, original.__func__))
        if inspect.isgeneratorfunction(original):

            @functools.wraps(original)
            def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
                made = original(*args, **kwargs)
                while True:
                    try:
                        item = self._charge(stage, functools.partial(next, made))
                    except StopIteration:
                        return
                    yield item

            return generate

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._charge(stage, functools.partial(original, *args, **kwargs))

        return call

    def _charge(self, stage: str, run: Callable[[], Any]) -> Any:
        stack: list[list[float]] = self._local.__dict__.setdefault("stack", [])
        stack.append([0.0, 0.0])  # what calls of other stages take
        cpu, wall = time.thread_time(), time.perf_counter()
        try:
            return run()
        finally:
            taken = (time.thread_time() - cpu, time.perf_counter() - wall)
            inner = stack.pop()
            with self._lock:
                for kind in range(2):
                    self.totals[stage][kind] += taken[kind] - inner[kind]
            if stack:
                for kind in range(2):
                    stack[-1][kind] += taken[kind]


def _holders(owner: Any, attribute: str, original: Any) -> list[Any]:
    if inspect.isclass(owner):
        return [owner]
    modules = [m for name, m in sys.modules.items() if name.startswith("cache_builder")]
    holders = [module for module in modules if module.__dict__.get(attribute) is original]
    return holders if owner in holders else [owner, *holders]
