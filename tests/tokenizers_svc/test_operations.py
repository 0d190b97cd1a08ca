"""What an operator sees: metrics, probes, logs, signals; and that the page about it is true."""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from typer.testing import CliRunner

from cache_builder.cli import app as command_line
from cache_builder.errors import ConfigError
from cache_builder.formats.codebook import Codebook
from tests.tokenizers_svc.support import (
    ROOT,
    WatchedTokenizer,
    jpeg,
    make_client,
    make_codebook,
    post,
    process,
    wait_ready,
    wait_until,
)
from tokenizers_svc.access import AccessOptions
from tokenizers_svc.app import create_app
from tokenizers_svc.health import Watchdog
from tokenizers_svc.limits import Limits
from tokenizers_svc.logs import JsonFormatter
from tokenizers_svc.options import ServiceOptions
from tokenizers_svc.renewal import renew
from tokenizers_svc.serve import run, run_app

PAGE = (ROOT / "docs" / "service-operations.md").read_text()
KEYS = ["the-first-key-of-the-test", "the-second-key-of-the-test"]

STUCK = """
from tests.tokenizers_svc.support import WatchedTokenizer
from tokenizers_svc.app import create_app
from tokenizers_svc.health import Watchdog
from tokenizers_svc.limits import Limits
from tokenizers_svc.serve import run_app

class Stuck(WatchedTokenizer):
    def encode(self, pixels):
        if len(self.batch_sizes) == 2:  # the warm-up is over
            self.may_run.clear()
        return super().encode(pixels)

app = create_app(Stuck(), limits=Limits(request_deadline_s=3))
app.state.service._watchdog = Watchdog(0.5)
run_app(app, port=0)
"""


def table(heading):
    """The rows of the table whose first column is called so, as lists of cells."""
    _, _, below = PAGE.partition(f"\n| {heading} |")
    rows = below.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]


def test_the_page_lists_the_metrics_that_a_service_exports(client):
    post(client, jpeg())
    post(client, b"no picture")
    answer = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    exported = {
        family.name: family
        for family in text_string_to_metric_families(answer.text)
        if family.name.startswith("patchcache_")
    }
    documented = {name.strip("`"): (kind, labels) for name, kind, labels, _ in table("metric")}
    assert sorted(documented) == sorted(
        name + "_total" * (family.type == "counter") for name, family in exported.items()
    )
    for name, family in exported.items():
        kind, labels = documented[name + "_total" * (family.type == "counter")]
        assert kind == family.type, name
        names = {label for sample in family.samples for label in sample.labels} - {"le"}
        if family.samples:
            assert names == set(re.findall(r"\w+", labels)), name


def test_metrics_tell_of_pictures_batches_and_refusals(client):
    def value(name):
        match = re.search(rf"^{re.escape(name)} (.+)$", client.get("/metrics").text, re.MULTILINE)
        return float(match[1]) if match else 0.0

    names = [
        'patchcache_images_total{model="tiny-k16"}',
        'patchcache_batch_size_count{model="tiny-k16"}',
        'patchcache_stage_seconds_count{model="tiny-k16",stage="decode"}',
        'patchcache_failures_total{reason="not-an-image"}',
        "patchcache_cache_hits_total",
    ]
    before = [value(name) for name in names]
    body = jpeg(seed=77)
    post(client, body)
    post(client, body)
    files = [("files", ("a.jpg", jpeg(seed=78))), ("files", ("b.jpg", b"no picture"))]
    assert client.post("/v1/tokenize/batch", files=files).status_code == 200
    wait_until(lambda: [value(name) for name in names[3:]] == [before[3] + 1, before[4] + 1])
    after = [value(name) for name in names]
    assert [y - x for x, y in zip(before, after, strict=True)] == [3, 2, 2, 1, 1]
    assert 0 < value('patchcache_codebook_used_ratio{model="tiny-k16"}') <= 1
    assert value("patchcache_ready") == 1


def test_the_page_lists_the_limits_with_their_defaults():
    rows = {name.strip("`"): default for name, default, _ in table("limit")}
    defaults = {name: field.default for name, field in Limits.model_fields.items()}
    assert rows == {n: "null" if d is None else f"{d:,}" for n, d in defaults.items()}


def test_the_page_lists_the_fields_of_a_line_of_the_log(client, caplog):
    caplog.set_level(logging.INFO, "patchcache.access")
    post(client, jpeg(seed=5))
    post(client, b"no picture")
    wait_until(lambda: len(access_lines(caplog)) == 2)
    fields = {name for line in access_lines(caplog) for name in line}
    assert {name.strip("`") for name, _ in table("field")} == fields
    good, bad = access_lines(caplog)
    assert (good["status"], good["model"], good["num_images"]) == (200, "tiny-k16", 1)
    assert set(good["stages_ms"]) == {"read", "decode", "queue", "infer"}
    assert (bad["model"], bad["problems"]) == ("tiny-k16", ["not-an-image"])


def access_lines(caplog):
    records = [record for record in caplog.records if record.name == "patchcache.access"]
    return [json.loads(JsonFormatter().format(record)) for record in records]


def test_the_service_is_not_ready_with_a_tokenizer_whose_ids_no_codebook_has():
    class Wrong(WatchedTokenizer):
        def encode(self, pixels):
            return super().encode(pixels) + 16  # K

    with pytest.raises(RuntimeError, match="worker has died") as caught:
        run_app(create_app(Wrong()), port=0)
    assert "ids that its codebook does not have" in str(caught.value.__cause__)


@pytest.mark.slow
def test_a_tokenizer_that_hangs_ends_the_process_with_1_and_the_reason():
    with process(STUCK) as (server, client, lines):
        wait_ready(client)
        asking = threading.Thread(target=lambda: post(client, jpeg()))
        asking.start()
        with make_client(str(client.base_url)) as other:
            wait_until(lambda: other.get("/readyz").status_code == 503)
        asking.join(20)
        assert server.wait(20) == 1
    assert "has ended no batch for" in "".join(lines)


def test_a_tokenizer_that_comes_back_too_late_ends_the_service_with_the_reason():
    class Stuck(WatchedTokenizer):
        def encode(self, pixels):
            if len(self.batch_sizes) == 2:  # the warm-up is over
                self.may_run.clear()
            return super().encode(pixels)

    def ask():
        with make_client(log.url) as client:
            wait_ready(client)
            post(client, jpeg())

    def come_back():
        wait_until(lambda: any("The service ends" in line for line in log.lines))
        tokenizer.may_run.set()

    tokenizer = Stuck()
    app = create_app(tokenizer)
    app.state.service._watchdog = Watchdog(0.3)
    threads = [threading.Thread(target=work) for work in (ask, come_back)]
    log = Lines(on_url=lambda: [thread.start() for thread in threads])
    with heard(log), pytest.raises(RuntimeError, match="has ended no batch for"):
        run_app(app, port=0)
    for thread in threads:
        thread.join(20)


def test_sighup_of_a_server_that_has_not_begun_does_no_harm(codebook_path):
    app = create_app(codebook_path, device="cpu")
    begin = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def begin_late(app):
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        async with begin(app) as state:
            yield state

    app.router.lifespan_context = begin_late
    run_app(app, port=0)


def test_what_nobody_foresaw_leaves_a_model_what_it_was_and_is_logged(
    codebook_path, monkeypatch, caplog
):
    def fail(path):
        raise MemoryError

    app = create_app(codebook_path, device="cpu")
    monkeypatch.setattr(Codebook, "load", fail)
    asyncio.run(renew(app))
    assert "model tiny-k16 stays what it was" in caplog.text
    assert "MemoryError" in caplog.text


def test_sighup_takes_keys_and_codebooks_anew_and_keeps_the_old_for_what_is_wrong(tmp_path):
    keys, path = tmp_path / "keys", tmp_path / "tiny.safetensors"
    keys.write_text(KEYS[0])
    one, two = make_codebook(), make_codebook(num_stages=2)
    one.save(path)
    options = ServiceOptions(
        codebooks={"tiny": str(path)}, device="cpu", access=AccessOptions(key_file=keys)
    )
    problems = []

    def operate():
        try:
            assert answer(KEYS[0]).headers["x-tokenizer-fingerprint"] == one.fingerprint
            assert answer(KEYS[1]).status_code == 401
            keys.write_text(KEYS[1])
            two.save(path)
            os.kill(os.getpid(), signal.SIGHUP)
            wait_until(is_new)
            keys.write_text("short")
            path.write_bytes(b"no codebook")
            os.kill(os.getpid(), signal.SIGHUP)
            wait_until(lambda: any("model tiny stays what it was" in line for line in log.lines))
            assert any("the keys stay what they were" in line for line in log.lines)
            assert is_new()
        except Exception as exc:  # noqa: BLE001 - the main thread tells of it
            problems.append(exc)
        os.kill(os.getpid(), signal.SIGINT)

    def answer(key):
        with make_client(log.url) as client:
            return client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})

    def is_new():
        new = answer(KEYS[1])
        is_two = new.headers["x-tokenizer-fingerprint"] == two.fingerprint
        return new.status_code == 200 and is_two and answer(KEYS[0]).status_code == 401

    log = Lines(on_url=lambda: threading.Thread(target=operate).start())
    with heard(log):
        run(options=options, port=0)
    assert problems == []
    assert not any(key in line for key in KEYS for line in log.lines)


class Lines(logging.Handler):
    """Lines of the log; the URL of the service is taken from them."""

    def __init__(self, on_url):
        super().__init__()
        self.lines, self.url, self._on_url = [], None, on_url

    def emit(self, record):
        line = record.getMessage()
        self.lines.append(line)
        if line.startswith("try: curl"):
            self.url = line.split()[-1].removesuffix("/v1/tokenize")
            self._on_url()


@contextlib.contextmanager
def heard(log):
    """Let `log` hear what the service logs."""
    logging.getLogger("tokenizers_svc").addHandler(log)
    logging.getLogger("tokenizers_svc").setLevel(logging.INFO)
    try:
        yield
    finally:
        logging.getLogger("tokenizers_svc").removeHandler(log)
        logging.getLogger("tokenizers_svc").setLevel(logging.NOTSET)


@pytest.mark.slow
def test_the_command_logs_json_in_a_pipe_and_answers_metrics_at_a_port_of_their_own(codebook_path):
    words = ["serve", "--codebook", f"mine={codebook_path}", "--port", "0", "--device", "cpu",
             "--metrics-port", "0", "--limit", "drain_s=0", "--no-page"]  # fmt: skip
    running = subprocess.Popen(
        [sys.executable, "-m", "cache_builder", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    lines = []
    with running:
        try:
            for text in running.stderr:
                lines.append(json.loads(text))
                if "try: curl" in lines[-1]["message"]:
                    break
            url = lines[-1]["message"].split()[-1].removesuffix("/v1/tokenize")
            metrics = next(x["message"] for x in lines if x["message"].startswith("metrics at "))
            with make_client(url) as client, make_client("http://ignored") as other:
                wait_ready(client)
                assert post(client, jpeg()).json()["model"] == "mine"
                metrics_url = metrics.removeprefix("metrics at ")
                wait_until(lambda: 'images_total{model="mine"} 1.0' in other.get(metrics_url).text)
            running.send_signal(signal.SIGTERM)
            lines += [json.loads(text) for text in running.stderr]
            assert running.wait(20) == 0
        finally:
            running.kill()
    served = [line for line in lines if line["logger"] == "patchcache.access"]
    assert [(line["route"], line["status"]) for line in served] == [("/v1/tokenize", 200)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "max_bach=4"], "There is no limit 'max_bach'; did you mean 'max_batch'?"),
        (["--limit", "max_batch"], "--limit takes NAME=VALUE, not 'max_batch'."),
        (["--limit", "max_batch=-1"], "--limit max_batch=-1: Input should be greater than"),
        (["--replicas", "2"], "--replicas has no meaning without --ray."),
        (["--ray", "--min-replicas", "2"], "--min-replicas and --max-replicas go together"),
        (["--ray", "--metrics-port", "9"], "--metrics-port is not for replicas on Ray."),
        (["--host", "0.0.0.0"], "it has no keys."),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, message, codebook_path, monkeypatch):
    monkeypatch.setattr("tokenizers_svc.logs.configure", lambda *args, **options: None)
    done = CliRunner().invoke(
        command_line, ["serve", "--codebook", str(codebook_path), "--device", "cpu", *words]
    )
    assert isinstance(done.exception, ConfigError), done.output
    assert message in str(done.exception)
