"""One record of each request, and what metrics, logs and traces make of it."""

import asyncio
import contextlib
import io
import json
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from cache_builder.errors import ConfigError
from tests.tokenizers_svc.support import make_codebook, wait_until
from tokenizers_svc import logs, tracing
from tokenizers_svc.batch_reports import BatchReport
from tokenizers_svc.health import ModelState, ServiceState, Watchdog
from tokenizers_svc.metrics import CodebookUsage, Metrics
from tokenizers_svc.observation import Observation
from tokenizers_svc.problems import ProblemError, problem_response

KEY = "a-secret-key-of-32-characters-xx"
MODEL = ModelState(
    "tiny", "ab" * 32, "pixel", 4, "cpu", True, True,
    num_waiting=3, num_running=2, num_batches=7, num_dropped=1, busy_s=0.5,
)  # fmt: skip
STATE = ServiceState(True, 5, 1000, 2, 8, 9, (MODEL,))


def make_app(*observers):
    """An application whose routes note what those of the service note."""
    app = FastAPI()

    @app.post("/v1/models/{name}")
    async def tokenize(request: Request, name: str):
        await request.body()
        record = request.state.record
        request.state.request_id = "r-1"
        record.model, record.num_images = "tiny", 1
        for stage, seconds in (("read", 0.001), ("decode", 0.002), ("queue", 0.3), ("infer", 0.04)):
            record.add_stage(stage, seconds)
        return {"name": name}

    @app.get("/readyz")
    async def refuse():
        return problem_response(ProblemError("not-ready", "It loads."), "r-2")

    @app.get("/broken")
    async def fail():
        raise ValueError("a reason")

    return Observation(app, observers=observers)


def ask(app, method, path, **options):
    async def in_loop():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(in_loop())


def samples(metrics):
    text, _ = metrics.render("text/plain")
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_a_request_is_counted_by_the_template_of_its_route():
    metrics = Metrics(lambda: STATE)
    app = make_app(metrics.note_request)
    ask(app, "POST", "/v1/models/one", content=b"12345")
    ask(app, "POST", "/v1/models/two", content=b"12345")
    ask(app, "GET", "/nowhere/at/all")
    ask(app, "BREW", "/nowhere")
    found = samples(metrics)
    assert found["patchcache_http_requests_total", "POST", "/v1/models/{name}", "200"] == 2
    assert found["patchcache_http_requests_total", "GET", "unmatched", "404"] == 1
    assert found["patchcache_http_requests_total", "other", "unmatched", "404"] == 1
    assert found["patchcache_http_received_bytes_total",] == 10
    assert found["patchcache_images_total", "tiny"] == 2
    assert found["patchcache_stage_seconds_count", "tiny", "queue"] == 2
    assert found["patchcache_stage_seconds_sum", "tiny", "queue"] == pytest.approx(0.6)


def test_refusals_at_the_door_are_counted_apart_from_failures():
    metrics = Metrics(lambda: STATE)
    app = make_app(metrics.note_request)
    ask(app, "GET", "/readyz")
    assert samples(metrics)["patchcache_admission_rejected_total", "not-ready"] == 1


def test_a_request_whose_client_left_before_the_answer_is_cancelled():
    async def hang_up(scope, receive, send):
        raise asyncio.CancelledError

    metrics = Metrics(lambda: STATE)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Observation(hang_up, observers=[metrics.note_request])(scope, None, None))
    found = samples(metrics)
    assert found["patchcache_cancelled_total", ""] == 1
    assert found["patchcache_http_requests_total", "GET", "unmatched", "499"] == 1


def test_the_state_is_read_when_prometheus_asks():
    states = [STATE, STATE._replace(is_ready=False, models=(MODEL._replace(num_waiting=0),))]
    metrics = Metrics(lambda: states[0])
    assert samples(metrics)["patchcache_queue_depth", "tiny"] == 3
    states.pop(0)
    found = samples(metrics)
    assert found["patchcache_queue_depth", "tiny"] == 0
    assert found["patchcache_ready",] == 0
    assert found["patchcache_model_info", "cpu", "pixel", "ab" * 32, "tiny", "4"] == 1


def test_metrics_come_as_openmetrics_to_those_who_ask_for_it():
    text, media_type = Metrics(lambda: STATE).render("application/openmetrics-text; version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


def test_two_services_in_one_process_count_for_themselves():
    one, two = Metrics(lambda: STATE), Metrics(lambda: STATE)
    one.note_batch("tiny", BatchReport(3, 0.02, ()))
    assert samples(one)["patchcache_batch_size_sum", "tiny"] == 3
    assert ("patchcache_batch_size_sum", "tiny") not in samples(two)


def test_the_used_share_of_a_codebook_is_that_of_the_last_thousand_pictures():
    usage = CodebookUsage(make_codebook(num_stages=2))  # K = 16
    assert usage.ratio() == 0
    usage.add(np.array([0, 1, 1, 1]))  # two patches: 0 and 1 of stage 0, 1 of stage 1
    assert usage.ratio() == 3 / 32
    for _ in range(999):
        usage.add(np.zeros((1, 1, 2), np.int64))
    assert usage.ratio() == 4 / 32
    usage.add(np.zeros((1, 1, 2), np.int64))
    assert usage.ratio() == 2 / 32


def test_another_codebook_of_the_same_name_is_counted_afresh():
    metrics, one, two = Metrics(lambda: STATE), make_codebook(), make_codebook()
    metrics.note_ids("tiny", one, np.arange(8))
    assert samples(metrics)["patchcache_codebook_used_ratio", "tiny"] == 8 / 16
    metrics.note_ids("tiny", two, np.arange(2))
    assert samples(metrics)["patchcache_codebook_used_ratio", "tiny"] == 2 / 16


def test_the_watchdog_notices_a_model_that_has_work_and_gets_nothing_done():
    now = [0.0]
    watchdog = Watchdog(30, lambda: now[0])
    steps = [
        (0, 0, 7, None),  # time, pictures, batches ended so far, complaint
        (100, 0, 7, None),  # nothing to do
        (101, 5, 7, None),
        (130, 5, 7, None),
        (131, 5, 8, None),  # slow, but it works
        (160, 5, 8, None),
        (162, 5, 8, "The model tiny has ended no batch for 31 s while 5 pictures wait for it."),
    ]
    for moment, num_waiting, num_batches, complaint in steps:
        now[0] = moment
        state = MODEL._replace(num_waiting=num_waiting, num_running=0, num_batches=num_batches)
        assert watchdog.complaint([state]) == complaint, moment


def test_the_watchdog_lets_a_model_take_its_time_to_load():
    now = [0.0]
    watchdog = Watchdog(30, lambda: now[0])
    loading = MODEL._replace(is_ready=False)
    assert watchdog.complaint([loading]) is None
    now[0] = 1000
    assert watchdog.complaint([loading]) is None
    assert watchdog.complaint([MODEL]) is None


def test_a_blocked_event_loop_shows_in_its_lag():
    metrics = Metrics(lambda: STATE)

    def lag_sum():
        return samples(metrics)["patchcache_event_loop_lag_seconds_sum",]

    async def block():
        watching = asyncio.create_task(metrics.watch_loop())
        await asyncio.sleep(0)
        threading.Event().wait(0.4)  # the loop cannot run meanwhile
        while not lag_sum():
            await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(asyncio.wait_for(block(), 20))
    assert lag_sum() > 0.1


def test_an_observer_that_fails_hurts_nobody(caplog):
    def break_down(record):
        raise ValueError("full disk")

    seen = []
    answer = ask(make_app(break_down, seen.append), "POST", "/v1/models/one")
    assert answer.status_code == 200
    assert len(seen) == 1
    assert "an observer of requests failed" in caplog.text


@pytest.fixture
def log_stream():
    """Where the log goes, with the logging of pytest put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:], root.level = handlers, level


def written(stream):
    """What a stream holds once the handlers have written what they have."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    return stream.getvalue()


def test_the_access_log_is_json_with_the_stages_of_the_request(log_stream):
    logs.configure("json", stream=log_stream)
    ask(make_app(logs.log_request), "POST", "/v1/models/x", content=b"12345")
    (line,) = map(json.loads, written(log_stream).splitlines())
    assert line["level"] == "info"
    assert line["logger"] == "patchcache.access"
    assert line["request_id"] == "r-1"
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/models/{name}", 200)
    assert (line["model"], line["num_images"], line["received_bytes"]) == ("tiny", 1, 5)
    assert line["stages_ms"] == {"read": 1.0, "decode": 2.0, "queue": 300.0, "infer": 40.0}
    assert line["time"].endswith("Z")


def test_the_text_log_is_a_line_a_person_reads(log_stream):
    logs.configure("text", stream=log_stream)
    ask(make_app(logs.log_request), "POST", "/v1/models/x")
    line = written(log_stream)
    assert line.startswith("POST /v1/models/{name} 200 in ")
    assert line.endswith("read=1 decode=2 queue=300 infer=40 r-1\n")


def test_lines_of_an_event_loop_are_written_together_and_soon(log_stream):
    logs.configure("text", stream=log_stream)
    logger = logging.getLogger("any")

    async def work():
        logger.info("one")
        logger.info("two")
        assert log_stream.getvalue() == ""
        await asyncio.to_thread(wait_until, lambda: log_stream.getvalue() == "one\ntwo\n")
        logger.info("three")
        logger.warning("four")
        assert log_stream.getvalue().endswith("three\nfour\n")
        logger.info("five")

    asyncio.run(work())
    logger.info("six")  # the loop that was to write the line before has ended
    assert log_stream.getvalue().endswith("five\nsix\n")


def test_a_log_that_nobody_reads_any_more_disturbs_nobody(log_stream):
    logs.configure("text", stream=log_stream)
    log_stream.close()
    logging.getLogger("any").warning("to whom?")


def test_a_pipe_gets_json_and_a_terminal_text(log_stream):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    for stream in (log_stream, terminal):
        logs.configure("auto", stream=stream)
        logging.getLogger("any").warning("two\nlines")
    assert json.loads(log_stream.getvalue())["message"] == "two\nlines"
    assert terminal.getvalue() == "two\nlines\n"


def test_probes_are_not_in_the_access_log(log_stream):
    logs.configure("json", stream=log_stream)
    ask(make_app(logs.log_request), "GET", "/readyz")
    assert log_stream.getvalue() == ""


def test_an_exception_is_one_line_of_json_with_its_traceback(log_stream):
    logs.configure("json", stream=log_stream)
    try:
        int("seven")
    except ValueError:
        logging.getLogger("any").exception("it failed")
    line = json.loads(log_stream.getvalue())
    assert line["exception"].endswith("invalid literal for int() with base 10: 'seven'")


def test_no_key_no_body_and_no_path_of_a_client_is_logged(log_stream):
    logs.configure("json", level=logging.DEBUG, stream=log_stream)
    app = make_app(logs.log_request)
    headers = {"Authorization": f"Bearer {KEY}", "X-Anything": "hush-header"}
    ask(app, "POST", "/v1/models/hush-path?token=hush-query", content=b"hush-body", headers=headers)
    ask(app, "GET", f"/hush-path/{KEY}", headers=headers)
    ask(app, "GET", "/broken", headers=headers)
    lines = [json.loads(line) for line in written(log_stream).splitlines()]
    assert [line["status"] for line in lines if "status" in line] == [200, 404, 500]
    assert "hush" not in written(log_stream)
    assert KEY not in written(log_stream)


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
