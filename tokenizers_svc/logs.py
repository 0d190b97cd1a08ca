"""How a service logs: a line a person can read on a terminal, JSON in a pipe.

Configured by the command, never at import; everything below uses `logging`. The access log has
one line for each request except probes and metrics, made from the request's record alone, which
holds nothing that a client wrote: no body, no key, no header, no path.
"""

import asyncio
import contextlib
import functools
import json
import logging
import math
import sys
import time
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

from pydantic_core import to_json

from tokenizers_svc.observation import QUIET_ROUTES, RequestRecord

LogFormat = Literal["auto", "text", "json"]

_access: Final = logging.getLogger("patchcache.access")
_FLUSH_S: Final = 0.05
_CHATTY: Final = ("ray", "httpx", "httpcore", "PIL", "asyncio", "uvicorn", "opentelemetry")


def configure(
    log_format: LogFormat = "auto", *, level: int = logging.INFO, stream: TextIO | None = None
) -> None:
    """Send every log line of this process to a stream.

    Args:
        log_format: `auto` is text on a terminal and JSON elsewhere.
        level: Lowest level of our own loggers.
        stream: None is standard error.
    """
    stream = sys.stderr if stream is None else stream
    is_json = log_format == "json" or (log_format == "auto" and not stream.isatty())
    handler = LineHandler(stream)
    handler.setFormatter(JsonFormatter() if is_json else logging.Formatter("%(message)s"))
    root = logging.getLogger()
    for known in root.handlers[:]:
        root.removeHandler(known)
    root.addHandler(handler)
    root.setLevel(level)
    # Nothing here prints them, and each is looked up for every line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


class LineHandler(logging.StreamHandler[TextIO]):
    """A stream that gets the lines of an event loop several at a time.

    A write lets other threads have the interpreter, and the loop then has to wait for it behind
    those that decode: at every line, it would be the longest part of a request. Warnings, and lines
    of other threads, are written at once.
    """

    def __init__(self, stream: TextIO) -> None:
        """Begin with nothing to write."""
        super().__init__(stream)
        self._lines: list[str] = []
        self._due_in: asyncio.AbstractEventLoop | None = None  # who is to write them

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or let it be written within a twentieth of a second."""
        try:
            self._lines.append(self.format(record) + self.terminator)
        except Exception:  # noqa: BLE001 - logging itself tells of a line that cannot be made
            self.handleError(record)
        loop = _running_loop()
        if loop is None or record.levelno > logging.INFO:
            self.flush()
        elif loop is not self._due_in:
            self._due_in = loop
            loop.call_later(_FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write what there is."""
        assert self.lock
        with self.lock:
            text = "".join(self._lines)
            self._lines.clear()
            self._due_in = None
            # Nobody can be told that nobody reads any more, or that the disk is full.
            with contextlib.suppress(OSError, ValueError):
                self.stream.write(text)
                super().flush()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields of the record, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        seconds = math.floor(record.created)
        line: dict[str, Any] = {
            "time": f"{_second(seconds)}.{math.floor(1000 * (record.created - seconds)):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if isinstance(record.msg, _Line):
            line |= record.msg.fields()
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line)


def _encode(line: dict[str, Any]) -> str:
    """Return JSON in ASCII, which every stream can take."""
    try:
        text = to_json(line, fallback=str)
    except ValueError:  # half of a surrogate pair, as in names of files that are not UTF-8
        return json.dumps(line, default=str)
    return text.decode() if text.isascii() else json.dumps(line, default=str)


@functools.lru_cache(2)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def log_request(record: RequestRecord) -> None:
    """Write the line of one request: an observer of `Observation`."""
    if record.route in QUIET_ROUTES or not _access.isEnabledFor(logging.INFO):
        return
    # Not `info`, which walks the stack for the line that called it, at every request.
    line = logging.LogRecord(_access.name, logging.INFO, "", 0, _Line(record), None, None)
    line.created -= time.perf_counter() - record.ended  # the moment of the request, not of the line
    _access.handle(line)


class _Line:
    """What is logged of a request, made when a handler asks for it: as text, or as fields."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record

    def __str__(self) -> str:
        record = self._record
        stages = "".join(f" {name}={ms:g}" for name, ms in self._stages_ms().items())
        problems = f" {','.join(record.problems)}" if record.problems else ""
        return (
            f"{record.method} {record.route} {record.status} in {1000 * record.seconds:.1f} ms"
            f"{stages}{problems} {record.request_id}"
        )

    def fields(self) -> dict[str, Any]:
        record, stages_ms = self._record, self._stages_ms()
        fields: dict[str, Any] = {
            "message": f"{record.method} {record.route} {record.status}",
            "request_id": record.request_id,
            "method": record.method,
            "route": record.route,
            "status": record.status,
            "duration_ms": round(1000 * record.seconds, 2),
            "received_bytes": record.received_bytes,
            "sent_bytes": record.sent_bytes,
        }
        if record.model is not None:
            fields["model"] = record.model
        if record.num_images:
            fields["num_images"] = record.num_images
        if stages_ms:
            fields["stages_ms"] = stages_ms
        if record.problems:
            fields["problems"] = record.problems
        return fields

    def _stages_ms(self) -> dict[str, float]:
        stages = self._record.longest_stages()
        return {name: round(1000 * seconds, 2) for name, seconds in stages.items()}
