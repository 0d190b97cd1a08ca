"""What the metrics count, and what they read when Prometheus asks."""

import asyncio
import threading

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.tokenizers_svc.observed import MODEL, ask, make_app, told
from tests.tokenizers_svc.support import make_codebook
from tokenizers_svc.batch_reports import BatchReport
from tokenizers_svc.health import ServiceState
from tokenizers_svc.metrics import CodebookUsage, Metrics

STATE = ServiceState(True, 5, 1000, 2, 8, 9, (MODEL,))


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
        asyncio.run(told(hang_up, [metrics.note_request])(scope, None, None))
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
