"""What the service logs of a request, in which form, and what it never logs."""

import asyncio
import io
import json
import logging
import time
from datetime import UTC, datetime

import pytest

from tests.tokenizers_svc.observed import ask, make_app
from tests.tokenizers_svc.support import wait_until
from tokenizers_svc import logs
from tokenizers_svc.observation import RequestRecord

KEY = "a-secret-key-of-32-characters-xx"


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


def test_a_request_has_the_time_at_which_it_ended_however_late_its_line_is(log_stream):
    logs.configure("json", stream=log_stream)
    now = datetime.now(UTC)
    record = RequestRecord("POST", ended=time.perf_counter() - 60)
    logs.log_request(record)
    logged = datetime.fromisoformat(json.loads(written(log_stream))["time"])
    assert 59 < (now - logged).total_seconds() < 61


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


def test_a_line_is_ascii_whatever_it_tells(log_stream):
    logs.configure("json", stream=log_stream)
    for name in ("caf\xe9", "half of a pair: \udce9"):
        logging.getLogger("any").warning("%s", name)
    text = written(log_stream)
    assert text.isascii()
    assert [json.loads(line)["message"] for line in text.splitlines()] == [
        "caf\xe9", "half of a pair: \udce9",
    ]  # fmt: skip


def test_the_time_of_a_line_is_that_of_its_record():
    record = logging.LogRecord("any", logging.INFO, "", 0, "it is", None, None)
    record.created = 1_000_000_000.0625
    assert json.loads(logs.JsonFormatter().format(record))["time"] == "2001-09-09T01:46:40.062Z"
