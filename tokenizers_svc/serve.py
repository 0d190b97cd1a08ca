"""A process that serves: the port, the signals and the end.

The HTTP server runs in a thread of its own, so that the main thread can wait for signals and lead
the shutdown:

    first SIGTERM    not ready at once, still serving for `drain_s`; then no new connections,
                     everything that was let in is answered, exit code 0
    first SIGINT     the same without the wait: a person is watching
    one more         of either: stop now
    SIGHUP           keys and codebooks are read again

When the tokenizer cannot be loaded, dies or is stuck, the server stops and the reason is raised: a
process that can only refuse had better be restarted.
"""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from prometheus_client import start_http_server
from pydantic import SecretStr

from cache_builder.errors import ConfigError, PatchCacheError
from tokenizers_svc.access import check_exposure, is_exposed
from tokenizers_svc.app import create_app
from tokenizers_svc.collection import spare_what_is_loaded
from tokenizers_svc.connections import bounded_config
from tokenizers_svc.limits import Limits
from tokenizers_svc.options import ServiceOptions
from tokenizers_svc.renewal import renew
from tokenizers_svc.service import TokenizeService
from tokenizers_svc.signals import Signals, caught_signals, next_signal
from tokenizers_svc.tracing import make_tracer

logger = logging.getLogger(__name__)

_BACKLOG = 512
_POLL_S = 0.2
_KEY_VARIABLES = ("PATCHCACHE_SERVE_KEYS", "PATCHCACHE_SERVE_ADMIN_KEYS")
_OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def run(
    codebook: str | Path | None = None,
    *,
    options: ServiceOptions | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
    weights: str | None = None,
    limits: Limits | None = None,
    insecure: bool = False,
    metrics_port: int | None = None,
    otlp_endpoint: str | None = None,
) -> None:
    """Serve a codebook's tokenizer until SIGTERM or SIGINT. Call it from the main thread.

    The URL and a command to try are logged at INFO.

    Args:
        codebook: Path of the codebook; None takes those of the options.
        options: Everything that is said once for the service.
        host: Address to listen at.
        port: 0 takes a free one; the log says which.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        weights: Weights file of the feature model, if it is not where the codebook says.
        limits: What is accepted; None is the defaults.
        insecure: Listen where others can reach it although there are no keys.
        metrics_port: Answer /metrics at this port of 127.0.0.1 too, without a key.
        otlp_endpoint: Collector of traces; None is what OTEL_EXPORTER_OTLP_ENDPOINT says, or none.

    Raises:
        ArtifactError: There is no codebook, or it is damaged.
        ConfigError: No such device, a port cannot be listened at, strangers could reach a service
            without keys, or tracing is not installed.
        TokenizerMismatchError: The weights are not those of the codebook.
        RuntimeError: The tokenizer or the HTTP server died, or the tokenizer was stuck.
    """
    options = with_environment(options or ServiceOptions())
    app = create_app(codebook, device=device, weights=weights, limits=limits, options=options)
    check_exposure(host, app.state.access, insecure=insecure)
    with _metrics_at(app, metrics_port), _traced(app, otlp_endpoint):
        run_app(app, host=host, port=port)


def with_environment(options: ServiceOptions) -> ServiceOptions:
    """Return options with the keys of PATCHCACHE_SERVE_KEYS and PATCHCACHE_SERVE_ADMIN_KEYS too.

    Both hold lines of a key file, with commas between.
    """
    keys, admin_keys = (
        tuple(SecretStr(line) for line in os.environ.get(name, "").split(",") if line.strip())
        for name in _KEY_VARIABLES
    )
    access = options.access
    added = {"keys": access.keys + keys, "admin_keys": access.admin_keys + admin_keys}
    return options.model_copy(update={"access": access.model_copy(update=added)})


def run_app(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve an application of `create_app` until SIGTERM or SIGINT; see `run`."""
    service: TokenizeService = app.state.service
    listener = listen(host, port)
    server = make_server(app)
    thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
    with listener, caught_signals(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        thread.start()
        announce(app, host, listener.getsockname()[1])
        was_asked = _wait_for_end(app, thread, signals)
        complaint = service.complaint()
        server.should_exit = True
        while thread.is_alive():
            if next_signal(signals, _POLL_S) in (signal.SIGTERM, signal.SIGINT):
                server.force_exit = True
        app.state.audience.tell()  # a server that is forced does not
    if complaint is None:
        _raise_failure(service, was_asked=was_asked)
    if service.is_worker_alive:
        logger.warning("the tokenizer is still busy; the process ends without it")
        logging.shutdown()
        # The interpreter cannot end a thread that is deep in native code; trying may abort.
        os._exit(0 if complaint is None else 1)
    if complaint is not None and not was_asked:  # it has come back, too late
        raise RuntimeError(complaint)


@contextlib.contextmanager
def _metrics_at(app: FastAPI, port: int | None) -> Iterator[None]:
    """Answer /metrics at a port of its own, from a thread of its own."""
    if port is None:
        yield
        return
    service: TokenizeService = app.state.service
    listen("127.0.0.1", port).close()  # for our words about a port that is taken
    server, thread = start_http_server(port, "127.0.0.1", service.metrics.registry)
    logger.info("metrics at http://127.0.0.1:%d/metrics", server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def _traced(app: FastAPI, endpoint: str | None) -> Iterator[None]:
    """Send spans of the requests, if it is said where to."""
    if endpoint is None and not any(map(os.environ.get, _OTLP_VARIABLES)):
        yield
        return
    tracer = make_tracer(endpoint)
    app.state.audience.add(tracer.trace_request)
    try:
        yield
    finally:
        tracer.close()


def make_server(app: FastAPI) -> uvicorn.Server:
    """Return the HTTP server of an application of `create_app`."""
    service: TokenizeService = app.state.service
    config = bounded_config(
        app,
        service.limits,
        lifespan="on",
        timeout_graceful_shutdown=math.ceil(service.limits.request_deadline_s) + 1,
    )
    return uvicorn.Server(config)


def _wait_for_end(app: FastAPI, thread: threading.Thread, signals: Signals) -> bool:
    """Return when the server should stop accepting, and whether a signal asked for it."""
    service: TokenizeService = app.state.service
    has_spared = False
    while thread.is_alive() and service.failure is None:
        if not has_spared and service.why_not_ready() is None:
            spare_what_is_loaded()
            has_spared = True
        complaint = service.complaint()
        if complaint is not None:
            logger.error("%s The service ends.", complaint)
            return False
        number = next_signal(signals, _POLL_S)
        if number == signal.SIGHUP:
            if hasattr(app.state, "loop"):  # before, all has just been read
                asyncio.run_coroutine_threadsafe(renew(app), app.state.loop)
        elif number is not None:
            service.is_draining = True
            logger.info("%s: finishing what has begun", signal.Signals(number).name)
            if number == signal.SIGTERM:
                next_signal(signals, service.limits.drain_s)
            return True
    return False


def _raise_failure(service: TokenizeService, *, was_asked: bool) -> None:
    failure = service.failure
    if isinstance(failure, PatchCacheError):
        raise failure
    if failure is not None:
        raise RuntimeError("the tokenizer's worker has died") from failure
    if not was_asked:
        raise RuntimeError("the HTTP server has stopped by itself; the log says why")


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: The port is taken or not allowed, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as exc:
        reason = (getattr(exc, "strerror", None) or str(exc)).partition(" (while")[0]
        raise ConfigError(
            f"Cannot listen at {host} port {port}: {reason}. "
            "Pass another --port; 0 takes a free one."
        ) from exc


def announce(app: FastAPI, host: str, port: int) -> None:
    """Log what is served where, how to try it, and who may use it."""
    service: TokenizeService = app.state.service
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    for served in service.registry:
        rows, cols = served.codebook.pixel_rule.grid
        logger.info(
            "serving %s (K=%d, %d x %d tokens) at %s",
            served.name,
            served.codebook.vocab_size,
            rows,
            cols,
            url,
        )
    logger.info("try: curl --data-binary @photo.jpg %s/v1/tokenize", url)
    if is_exposed(host, app.state.access):
        logger.warning("whoever can reach %s may use it: there is no authentication", url)
