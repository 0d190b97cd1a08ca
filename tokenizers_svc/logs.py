"""How a service logs: a line a person can read on a terminal, JSON in a pipe.

Configured by the command, never at import; everything below uses `logging`. The access log has
one line for each request except probes and metrics, made from the request's record alone, which
holds nothing that a client wrote: no body, no key, no header, no path.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

from tokenizers_svc.observation import RequestRecord

LogFormat = Literal["auto", "text", "json"]

_access: Final = logging.getLogger("patchcache.access")
_QUIET_ROUTES: Final = {"/healthz", "/readyz", "/metrics"}
_encode: Final = json.JSONEncoder(default=str).encode
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
    handler = logging.StreamHandler(stream)
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


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields of the record, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
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


def log_request(record: RequestRecord) -> None:
    """Write the line of one request: an observer of `Observation`."""
    if record.route in _QUIET_ROUTES or not _access.isEnabledFor(logging.INFO):
        return
    # Not `info`, which walks the stack for the line that called it, at every request.
    level = {"levelno": logging.INFO, "levelname": "INFO"}
    line = {"name": _access.name, **level, "msg": _Line(record)}
    _access.handle(logging.makeLogRecord(line))


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
