"""The spans that a request leaves with a collector."""

import contextlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from cache_builder.errors import ConfigError
from tests.tokenizers_svc.observed import ask, make_app
from tokenizers_svc import tracing


@pytest.fixture(scope="module")
def collector():
    """An OTLP collector: gives its URL and the requests it has received."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()
    thread.join(20)


@contextlib.contextmanager
def traced(url):
    tracer = tracing.make_tracer(url)
    try:
        yield tracer.trace_request
    finally:
        tracer.close()


def spans_of(received):
    (path, request), *further = received
    assert (path, further) == ("/v1/traces", [])
    (of_resource,) = request.resource_spans
    (of_scope,) = of_resource.scope_spans
    received.clear()
    return of_resource.resource, of_scope.spans


def test_a_request_is_a_span_with_its_stages_below_it(collector):
    url, received = collector
    with traced(url) as observer:
        ask(make_app(observer), "POST", "/v1/models/x", content=b"12345")
        ask(make_app(observer), "GET", "/readyz")
    resource, spans = spans_of(received)
    assert {x.key: x.value.string_value for x in resource.attributes}["service.name"]
    by_name = {span.name: span for span in spans}
    assert set(by_name) == {"POST /v1/models/{name}", "read", "decode", "queue", "infer"}
    top = by_name.pop("POST /v1/models/{name}")
    assert {span.parent_span_id for span in by_name.values()} == {top.span_id}
    assert {span.trace_id for span in by_name.values()} == {top.trace_id}
    queue = by_name["queue"]
    assert queue.end_time_unix_nano - queue.start_time_unix_nano == pytest.approx(3e8, rel=0.01)
    attributes = {x.key: x.value for x in top.attributes}
    assert attributes["http.route"].string_value == "/v1/models/{name}"
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["patchcache.request_id"].string_value == "r-1"
    assert attributes["patchcache.model"].string_value == "tiny"


def test_the_trace_of_the_client_goes_on(collector):
    url, received = collector
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with traced(url) as observer:
        app = make_app(observer)
        ask(app, "POST", "/v1/models/x", headers={"traceparent": f"00-{trace}-{parent}-01"})
        # This client has decided that its trace is not sampled.
        ask(app, "POST", "/v1/models/x", headers={"traceparent": f"00-{trace}-{parent}-00"})
    _, spans = spans_of(received)
    assert len(spans) == 5
    top = next(span for span in spans if span.name.startswith("POST"))
    assert top.trace_id.hex() == trace
    assert top.parent_span_id.hex() == parent


def test_a_failure_is_marked_in_its_span(collector):
    url, received = collector
    with traced(url) as observer:
        ask(make_app(observer), "GET", "/broken", headers={"traceparent": "not one"})
    _, (span,) = spans_of(received)
    assert span.status.code == span.status.STATUS_CODE_ERROR


def test_without_the_extra_tracing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'patchcache\[tracing\]'"):
        tracing.make_tracer("http://127.0.0.1:4318")
