"""One process that reads damaged files, within limits, and says what came of each.

The worker is forked from a server that has imported everything, so that a new one costs little: a
crash or a hang ends the worker, the driver writes down the input, and another goes on behind it.
`faulthandler` ends a worker that is stuck anywhere, in C too, and leaves its stack in a file.
"""

import faulthandler
import gc
import itertools
import multiprocessing
import re
import resource
import shutil
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from cache_builder.errors import PatchCacheError
from tests.fuzz.formats import FORMATS, Format, mutators_of
from tests.fuzz.mutators import mutate

START = "forkserver"
MAX_SECONDS = 10.0  # for one input, on a busy machine
MAX_BYTES = 256 << 20  # beyond what the reader takes for the whole file
_MISSING = 0.01  # share of the inputs whose file is not there
_LONGEST_MESSAGE = 4000

Kind = Literal["error", "right", "told", "other", "failure"]
"""An error of ours; the answer of the whole file; another that `verify` tells; another that is
valid, of a file that no digest covers or that was forged; what must not be."""

# What a message says to do. Longer sentences are fine; a message without any such word is not.
_ADVICE = re.compile(
    r"\b(Run|run|Copy|Delete|delete|Pass|Put|Upgrade|Make|Build|Name|Say|Restore|restore|Correct|"
    r"Save|Write|Change|Use|Mend|To make one)\b"
)


class Result(NamedTuple):
    """What came of one input."""

    number: int
    kind: Kind
    seconds: float
    grown_bytes: int  # of the largest memory of the worker so far, beyond its start
    detail: str  # of a failure: which file, how it was damaged, what happened


class Input(NamedTuple):
    """One damaged file."""

    path: Path
    data: bytes | None  # None: the file is not there
    how: str
    is_forged: bool


def draw(form: Format, whole: dict[Path, bytes], seed: int, number: int) -> Input:
    """Return the damage of this number, the same for the same seed."""
    rng = np.random.default_rng([seed, number, *form.name.encode()])
    paths = list(whole)
    path = paths[rng.integers(len(paths))]
    if rng.random() < _MISSING:
        return Input(path, None, "missing", is_forged=False)
    mutant = mutate(whole[path], rng, mutators_of(path), list(whole.values()))
    return Input(path, mutant.data, mutant.how, mutant.is_forged)


def judge(form: Format, folder: Path, damaged: Input, answer: Any) -> tuple[Kind, str]:
    """Read a damaged artifact, and say what its reader's answer is worth."""
    try:
        found = form.read(folder)
    except PatchCacheError as exc:
        problem = message_problem(
            str(exc), folder, is_named=form.is_named and not damaged.is_forged
        )
        return ("failure", problem) if problem else ("error", "")
    except Exception:  # noqa: BLE001  whatever it is, it is written down
        return "failure", traceback.format_exc(limit=-6)
    if found == answer:
        return "right", ""
    if form.is_open or damaged.is_forged:
        return "other", ""
    if form.told_by is None:
        return "failure", "another answer, and nothing says so"
    try:
        if form.told_by(folder):
            return "told", ""
    except Exception:  # noqa: BLE001  whatever it is, it is written down
        return "failure", traceback.format_exc(limit=-6)
    return "failure", "another answer, and verify says that all is well"


def message_problem(message: str, folder: Path, *, is_named: bool) -> str | None:
    """Say what a message lacks: the place, what to do, or that it is one readable line."""
    if is_named and str(folder) not in message:
        return f"the message names no file: {message[:500]}"
    if is_named and not _ADVICE.search(message.replace(str(folder), "")):
        return f"the message does not say what to do: {message[:500]}"
    if len(message) > _LONGEST_MESSAGE or not message.isprintable():
        return f"the message is not one readable line: {message[:500]!r}"
    return None


def work(
    name: str,
    made: Path,
    folder: Path,
    numbers: Sequence[int],
    seed: int,
    trace: Path,
    current: Any,
    results: Connection,
) -> None:
    """Read the inputs of these numbers; `made` holds the whole artifact, `folder` is its own."""
    form = FORMATS[name]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    whole = {path: path.read_bytes() for path in form.files(folder)}
    answer = form.read(folder)
    assert form.read(folder) == answer, f"{form.name}: the whole artifact has no one answer"
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    begun_bytes = _peak_bytes()
    _limit_memory()
    with trace.open("w") as file:
        for number in numbers:
            damaged = draw(form, whole, seed, number)
            damage(damaged)
            current.value = number
            faulthandler.dump_traceback_later(MAX_SECONDS, exit=True, file=file)
            started_s = time.perf_counter()
            kind, detail = judge(form, folder, damaged, answer)
            seconds = time.perf_counter() - started_s
            faulthandler.cancel_dump_traceback_later()
            grown = max(0, _peak_bytes() - begun_bytes)
            if detail:
                detail = f"{damaged.path.relative_to(folder)} {damaged.how}: {detail}"
            results.send(Result(number, kind, seconds, grown, detail))
            damaged.path.write_bytes(whole[damaged.path])
    results.send(None)


def run(form: Format, made: Path, folder: Path, numbers: range, seed: int) -> Iterator[Result]:
    """Yield what came of every input, of crashes and hangs too."""
    context = multiprocessing.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload([__name__])
    rest: Sequence[int] = numbers
    for attempt in itertools.count():
        current = context.Value("q", -1, lock=False)
        receiver, sender = context.Pipe(duplex=False)
        trace = folder.with_suffix(f".{attempt}.trace")
        process = context.Process(
            target=work, args=(form.name, made, folder, rest, seed, trace, current, sender)
        )
        process.start()
        sender.close()
        try:
            while (result := receiver.recv()) is not None:
                yield result
        except EOFError:
            process.join()
        else:
            process.join()
            return
        number = current.value
        stack = trace.read_text() if trace.exists() else ""
        what = "hung" if "Timeout" in stack else f"ended the process ({process.exitcode})"
        yield Result(number, "failure", MAX_SECONDS if stack else 0.0, 0, f"{what} {stack[:1500]}")
        if number < 0:
            return  # the whole artifact cannot be read
        rest = rest[rest.index(number) + 1 :]


def damage(damaged: Input) -> None:
    """Write a damaged file where the whole one was."""
    if damaged.data is None:
        damaged.path.unlink()
    else:
        damaged.path.write_bytes(damaged.data)


def _limit_memory() -> None:
    status = Path("/proc/self/status").read_text()
    taken = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize"))
    limit = 1024 * taken + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
