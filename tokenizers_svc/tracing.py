"""OpenTelemetry, as an option: a span for each request, with a child for each stage of a picture.

Spans are made when the request has ended, from its record and with the times noted in it, so a
service without tracing pays nothing. A `traceparent` that the client sent is honoured: its trace
goes on here, and its decision whether to sample counts. Where spans go, and how many are kept, is
said in the usual variables, OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME,
which the library reads.
"""

import time
from typing import TYPE_CHECKING

from cache_builder.errors import ConfigError
from tokenizers_svc.observation import QUIET_ROUTES, RequestRecord

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

_MOST_STAGES = 256  # four of each picture in the largest batch
_SERVER_ERROR = 500


def make_tracer(endpoint: str | None = None) -> "OtlpTracer":
    """Return what sends spans by OTLP over HTTP.

    Args:
        endpoint: URL of a collector, such as `http://127.0.0.1:4318`; None is what
            OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT says.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"Tracing needs '{exc.name}', which is not installed. "
            "Run: pip install 'patchcache[tracing]'"
        ) from exc
    named = Resource({SERVICE_NAME: "patchcache"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=named)
    url = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return OtlpTracer(provider)


class OtlpTracer:
    """Turns records of requests into spans."""

    def __init__(self, provider: "TracerProvider") -> None:
        """Send spans to `provider`."""
        self._provider = provider
        self._tracer = provider.get_tracer("patchcache")

    def trace_request(self, record: RequestRecord) -> None:
        """Make the spans of a request that has ended: an observer of `Observation`."""
        from opentelemetry import trace
        from opentelemetry.trace import SpanKind, StatusCode

        if record.route in QUIET_ROUTES:
            return
        clock = time.time_ns() - int(1e9 * time.perf_counter())
        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            _context(record),
            SpanKind.SERVER,
            _attributes(record),
            start_time=_unix_ns(clock, record.started),
        )
        if record.status >= _SERVER_ERROR:
            span.set_status(StatusCode.ERROR)
        inside = trace.set_span_in_context(span)
        for stage in record.stages[:_MOST_STAGES]:
            begun = _unix_ns(clock, stage.ended - stage.seconds)
            child = self._tracer.start_span(stage.name, inside, start_time=begun)
            child.end(_unix_ns(clock, stage.ended))
        span.end(_unix_ns(clock, record.ended))

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def _unix_ns(clock: int, moment: float) -> int:
    return clock + int(1e9 * moment)


def _context(record: RequestRecord) -> "Context":
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {
        name: value
        for name, value in (
            ("traceparent", record.traceparent),
            ("tracestate", record.tracestate),
        )
        if value is not None
    }
    return TraceContextTextMapPropagator().extract(carrier)


def _attributes(record: RequestRecord) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "http.request.body.size": record.received_bytes,
        "http.response.body.size": record.sent_bytes,
        "patchcache.request_id": record.request_id,
        "patchcache.num_images": record.num_images,
    }
    if record.model is not None:
        attributes["patchcache.model"] = record.model
    if record.problems:
        attributes["error.type"] = record.problems[0]
    return attributes
