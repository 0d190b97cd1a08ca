"""What a service tells Prometheus, under names that begin with `patchcache_`.

Every application has a registry of its own, so two in one process do not mix. What happens is
counted when it happens; what is, such as the length of a queue, is read when Prometheus asks, so
it costs nothing in between. Labels come from closed sets: templates of routes, names of models,
codes of problems; a client cannot add to them.

`docs/service-operations.md` lists every name.
"""

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from cache_builder.formats.codebook import Codebook
from tokenizers_svc.batch_reports import BatchReport
from tokenizers_svc.health import ModelState, ServiceState
from tokenizers_svc.observation import CLIENT_CLOSED_REQUEST, RequestRecord

_LATENCIES_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
_LAGS_S: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_LAG_PERIOD_S: Final = 0.25
_REFUSALS_AT_THE_DOOR: Final = {"overloaded", "not-ready", "draining"}
USAGE_WINDOW: Final = 1000  # pictures


class Metrics:
    """The instruments of one application, and what they have counted."""

    def __init__(self, state: Callable[[], ServiceState]) -> None:
        """Make a registry.

        Args:
            state: Called whenever the metrics are read, possibly in another thread.
        """
        self.registry = CollectorRegistry()
        self._usage: dict[str, CodebookUsage] = {}
        self._last_batch: dict[str, float] = {}
        self.registry.register(_StateCollector(state, self._usage, self._last_batch))
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        make = _Maker(self.registry)
        self._requests = make.counter(
            "http_requests", "HTTP requests answered", "method", "route", "status"
        )
        self._duration = make.histogram(
            "http_request_duration_seconds", "first byte in to last byte out",
            _LATENCIES_S, "method", "route",
        )  # fmt: skip
        self._received = make.counter("http_received_bytes", "bytes of bodies received")()
        self._sent = make.counter("http_sent_bytes", "bytes of bodies sent")()
        self._stages = make.histogram(
            "stage_seconds",
            "time of one picture in one stage: read, decode, queue, infer",
            _LATENCIES_S, "model", "stage",
        )  # fmt: skip
        self._images = make.counter("images", "pictures answered", "model")
        self._rejected = make.counter(
            "admission_rejected", "requests refused at the door", "reason"
        )
        self._failures = make.counter(
            "failures", "requests, and pictures of batches, refused or failed", "reason"
        )
        self._cancelled = make.counter("cancelled", "requests whose client left", "model")
        self._batches = make.histogram(
            "batch_size", "pictures in one run of the model", _BATCH_SIZES, "model"
        )
        self._batch_seconds = make.histogram(
            "batch_seconds", "one run of the model", _LATENCIES_S, "model"
        )
        self._lag = make.histogram(
            "event_loop_lag_seconds", "how late the event loop was", _LAGS_S
        )()

    def note_request(self, record: RequestRecord) -> None:
        """Count a request that has ended: an observer of `Observation`."""
        self._requests(record.method, record.route, str(record.status)).inc()
        self._duration(record.method, record.route).observe(record.seconds)
        self._received.inc(record.received_bytes)
        self._sent.inc(record.sent_bytes)
        model = record.model or ""
        for stage in record.stages:
            self._stages(model, stage.name).observe(stage.seconds)
        if record.num_images:
            self._images(model).inc(record.num_images)
        for code in record.problems:
            counter = self._rejected if code in _REFUSALS_AT_THE_DOOR else self._failures
            counter(code).inc()
        if record.status == CLIENT_CLOSED_REQUEST:
            self._cancelled(model).inc()

    def note_batch(self, model: str, report: BatchReport) -> None:
        """Count a run of the model; called in the thread that ran it."""
        self._batches(model).observe(report.num_pictures)
        self._batch_seconds(model).observe(report.infer_s)
        self._last_batch[model] = time.time()

    def note_ids(self, model: str, codebook: Codebook, token_ids: NDArray[np.integer]) -> None:
        """Note which part of the codebook a picture used.

        Args:
            model: Its name.
            codebook: Its own; another one than before begins to be counted afresh.
            token_ids: Of one picture, (rows, cols[, M]) or flat in that order.
        """
        usage = self._usage.get(model)
        if usage is None or usage.codebook is not codebook:
            usage = self._usage[model] = CodebookUsage(codebook)
        usage.add(token_ids)

    async def watch_loop(self) -> None:
        """Measure for ever how late the event loop wakes; run it as a task."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_PERIOD_S
            await asyncio.sleep(_LAG_PERIOD_S)
            self._lag.observe(max(0.0, loop.time() - due))

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics and their media type, as text or, if asked for, OpenMetrics."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


class CodebookUsage:
    """Which share of a codebook the last pictures used.

    A share that falls tells of pictures unlike those of the fit, or of a camera that has died.
    """

    def __init__(self, codebook: Codebook) -> None:
        """Begin with nothing seen."""
        self.codebook = codebook
        self._seen: deque[NDArray[np.integer]] = deque(maxlen=USAGE_WINDOW)

    def add(self, token_ids: NDArray[np.integer]) -> None:
        """Note the ids of a picture, (rows, cols[, M]) or flat in that order; they are kept."""
        self._seen.append(token_ids)

    def ratio(self) -> float:
        """Return the share of ids among the last `USAGE_WINDOW` pictures, over all stages."""
        num_stages = self.codebook.num_stages
        is_used = np.zeros((num_stages, self.codebook.vocab_size), bool)
        seen = list(self._seen)  # it may be added to meanwhile
        if seen:
            flat = np.concatenate(seen, axis=None)
            for stage in range(num_stages):
                is_used[stage, flat[stage::num_stages]] = True
        return float(is_used.mean())


class _Maker:
    """Instruments of one registry with our prefix, each a function of the values of its labels.

    The library looks up an instrument of given labels under a lock, and there are a dozen of them
    to a request; here each is looked up once.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, *labels: str) -> Callable[..., Counter]:
        counter = Counter(f"patchcache_{name}", text, labels, registry=self._registry)
        return functools.cache(counter.labels) if labels else lambda: counter

    def histogram(
        self, name: str, text: str, buckets: Iterable[float], *labels: str
    ) -> Callable[..., Histogram]:
        histogram = Histogram(
            f"patchcache_{name}", text, labels, buckets=tuple(buckets), registry=self._registry
        )
        return functools.cache(histogram.labels) if labels else lambda: histogram


class _StateCollector(Collector):
    """What is, read when it is asked for."""

    def __init__(
        self,
        state: Callable[[], ServiceState],
        usage: dict[str, CodebookUsage],
        last_batch: dict[str, float],
    ) -> None:
        self._state = state
        self._usage = usage
        self._last_batch = last_batch

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        models = state.models
        yield _gauge("ready", "1 while clients should be sent here", [((), state.is_ready)])
        yield _gauge(
            "inflight_images", "pictures admitted and not yet answered", [((), state.num_admitted)]
        )
        yield _gauge("cache_bytes", "bytes of kept answers", [((), state.kept_bytes)])
        yield _counter("cache_hits", "answers that were kept", [((), state.num_hits)])
        yield _counter("cache_misses", "answers that were not kept", [((), state.num_misses)])
        yield _gauge("cache_entries", "kept answers", [((), state.kept_entries)])
        yield _gauge(
            "queue_depth", "pictures that no batch has taken", _each(models, "num_waiting"), "model"
        )
        yield _gauge("running_images", "pictures in a batch", _each(models, "num_running"), "model")
        yield _gauge(
            "worker_alive", "1 while the worker of the model runs", _each(models, "is_alive"),
            "model",
        )  # fmt: skip
        yield _counter(
            "dropped_images", "pictures dropped while they waited: client gone or too late",
            _each(models, "num_dropped"), "model",
        )  # fmt: skip
        yield _counter(
            "worker_busy_seconds", "time of the worker's threads in batches",
            _each(models, "busy_s"), "model",
        )  # fmt: skip
        yield _gauge(
            "worker_last_batch_timestamp_seconds",
            "when the last batch ended, Unix time",
            [((model,), when) for model, when in list(self._last_batch.items())],
            "model",
        )
        yield _gauge(
            "codebook_used_ratio",
            f"share of the codebook in the last {USAGE_WINDOW} pictures",
            [((model,), usage.ratio()) for model, usage in list(self._usage.items())],
            "model",
        )
        yield _gauge(
            "model_info",
            "1; the labels say what serves",
            [
                ((x.model, x.fingerprint, x.extractor, str(x.vocab_size), x.device), 1.0)
                for x in models
            ],
            "model", "fingerprint", "extractor", "vocab_size", "device",
        )  # fmt: skip


Values = list[tuple[tuple[str, ...], float]]


def _each(models: Iterable[ModelState], name: str) -> Values:
    return [((state.model,), float(getattr(state, name))) for state in models]


def _gauge(name: str, text: str, values: Values, *labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"patchcache_{name}", text, labels=labels)
    for labelled, value in values:
        family.add_metric(labelled, float(value))
    return family


def _counter(name: str, text: str, values: Values, *labels: str) -> CounterMetricFamily:
    family = CounterMetricFamily(f"patchcache_{name}", text, labels=labels)
    for labelled, value in values:
        family.add_metric(labelled, value)
    return family
