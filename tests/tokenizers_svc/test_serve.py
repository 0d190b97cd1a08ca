"""The process: ports, readiness, signals, the end."""

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from cache_builder.errors import ArtifactError, ConfigError
from cache_builder.formats.codebook import Codebook
from cache_builder.formats.codebook_header import ExtractorSpec
from tests.tokenizers_svc.support import (
    RULE,
    WatchedTokenizer,
    check_problem,
    expected_ids,
    jpeg,
    make_client,
    make_tokenizer,
    open_request,
    post,
    process,
    read_answer,
    serving,
    wait_ready,
    wait_until,
)
from tokenizers_svc.app import create_app
from tokenizers_svc.limits import Limits
from tokenizers_svc.serve import run, run_app

RUN = """
from tokenizers_svc.limits import Limits
from tokenizers_svc.serve import run

run(sys.argv[1], port=0, device="cpu", limits=Limits(drain_s=2))
"""

RUN_SLOWLY = """
import time
from tests.tokenizers_svc.support import WatchedTokenizer
from tokenizers_svc.app import create_app
from tokenizers_svc.limits import Limits
from tokenizers_svc.serve import run_app

class Slow(WatchedTokenizer):
    def encode(self, pixels):
        time.sleep(float(sys.argv[1]))
        return super().encode(pixels)

limits = Limits(max_batch=2, drain_s=0, body_timeout_s=600, request_deadline_s=600)
run_app(create_app(Slow(), limits=limits), port=0)
"""


def test_the_service_is_alive_but_not_ready_until_the_tokenizer_is_warm():
    tokenizer = WatchedTokenizer()
    tokenizer.may_run.clear()
    with serving(create_app(tokenizer), wait=False) as client:
        assert client.get("/healthz").json() == {"status": "alive"}
        problem = check_problem(client.get("/readyz"), 503, "not-ready")
        assert "being loaded" in problem["detail"]
        refused = post(client, jpeg())
        check_problem(refused, 503, "not-ready")
        assert refused.headers["retry-after"] == "1"
        tokenizer.may_run.set()
        wait_ready(client)
        assert client.get("/readyz").json() == {"status": "ready"}
        assert post(client, jpeg()).status_code == 200


def test_a_draining_service_is_not_ready_but_still_serves_and_asks_clients_to_move():
    app = create_app(make_tokenizer())
    with serving(app) as client:
        app.state.service.is_draining = True
        problem = check_problem(client.get("/readyz"), 503, "draining")
        assert "shutting down" in problem["detail"]
        answer = post(client, jpeg())
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
        assert client.get("/healthz").status_code == 200


@pytest.mark.slow
def test_sigterm_loses_nothing_and_exits_with_0(codebook_path):
    body, stop = jpeg(), threading.Event()
    expected = expected_ids(body)

    def ask_again_and_again(url):
        outcomes = []
        while not stop.is_set():
            with make_client(url) as client:
                outcomes.append(post(client, body).json()["token_ids"] == expected)
        return outcomes

    with process(RUN, codebook_path) as (server, client, lines), ThreadPoolExecutor(4) as pool:
        wait_ready(client)
        asking = [pool.submit(ask_again_and_again, str(client.base_url)) for _ in range(4)]
        upload = open_request(client, body, num_sent=700)
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/readyz").status_code == 503, timeout_s=1)
        time.sleep(0.4)
        stop.set()
        outcomes = [outcome for task in asking for outcome in task.result()]
        assert len(outcomes) > 20
        assert all(outcomes)
        wait_until(lambda: not can_connect(client), timeout_s=5)
        upload.sendall(body[700:])
        status, answer = read_answer(upload)
        assert status == 200
        assert json.loads(answer)["token_ids"] == expected
        assert server.wait(10) == 0
    assert "SIGTERM: finishing what has begun" in "".join(lines)


def can_connect(client):
    try:
        client.get("/healthz")
    except httpx.TransportError:
        return False
    return True


RUN_AND_SHOW_THE_COLLECTOR = """
import gc
from tests.tokenizers_svc.support import WatchedTokenizer
from tokenizers_svc.app import create_app
from tokenizers_svc.serve import run_app

app = create_app(WatchedTokenizer())

@app.get("/frozen")
def frozen():
    return [gc.get_freeze_count(), gc.isenabled()]

run_app(app, port=0)
"""


def test_the_collector_passes_over_what_was_loaded_and_goes_on_for_what_comes():
    with process(RUN_AND_SHOW_THE_COLLECTOR) as (running, client, _):
        wait_until(lambda: client.get("/frozen").json()[0] > 100_000)
        assert client.get("/frozen").json()[1]
        running.send_signal(signal.SIGINT)


@pytest.mark.slow
def test_sigterm_answers_every_picture_that_waits_in_the_queue():
    with process(RUN_SLOWLY, 0.1) as (server, client, _):
        wait_ready(client)
        bodies = [jpeg(seed=seed) for seed in range(8)]
        waiting = [open_request(client, body) for body in bodies]
        with make_client(str(client.base_url)) as newcomer:
            newcomer.get("/healthz")  # connections are accepted in turn: the others were before
        server.send_signal(signal.SIGTERM)
        for body, connection in zip(bodies, waiting, strict=True):
            status, answer = read_answer(connection)
            assert status == 200
            assert json.loads(answer)["token_ids"] == expected_ids(body)
        assert server.wait(10) == 0


@pytest.mark.slow
def test_sigterm_while_the_tokenizer_is_stuck_ends_the_process_all_the_same():
    with process(RUN_SLOWLY, 60) as (server, client, lines):
        check_problem(client.get("/readyz"), 503, "not-ready")
        server.send_signal(signal.SIGTERM)
        assert server.wait(8) == 0
    assert "the process ends without it" in "".join(lines)


@pytest.mark.slow
def test_a_second_signal_ends_it_although_a_client_is_still_sending():
    with process(RUN_SLOWLY, 0) as (server, client, lines):
        wait_ready(client)
        upload = open_request(client, jpeg(), num_sent=100)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: not can_connect(client))
        assert server.poll() is None  # it waits for the rest of the body
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        upload.close()
    assert "".join(lines).count("finishing what has begun") == 1


def test_ctrl_c_ends_without_the_wait(codebook_path):
    # In this process: pytest runs tests in the main thread, where signals arrive.
    before = signal.getsignal(signal.SIGINT)

    def interrupt():
        wait_until(lambda: signal.getsignal(signal.SIGINT) != before)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    started = time.perf_counter()
    run(codebook_path, port=0, device="cpu", limits=Limits(drain_s=60))
    assert time.perf_counter() - started < 20
    assert signal.getsignal(signal.SIGINT) == before


def test_a_tokenizer_that_dies_ends_the_process_with_its_reason():
    class Broken(WatchedTokenizer):
        def encode(self, pixels):
            raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="worker has died") as caught:
        run_app(create_app(Broken()), port=0)
    assert str(caught.value.__cause__) == "device lost"


def test_a_tokenizer_that_cannot_be_loaded_is_the_users_to_mend(tmp_path):
    path = tmp_path / "strange.safetensors"
    counts = np.ones((1, 4), np.int64)
    spec = ExtractorSpec(id="nonsense:model")
    centroids = np.zeros((1, 4, 8), np.float32)
    Codebook(centroids, counts, metric="l2", pixel_rule=RULE, extractor=spec).save(path)
    with pytest.raises(ConfigError, match="Unknown features 'nonsense:model'"):
        run(path, port=0, device="cpu")


def test_a_port_in_use_is_one_line_that_says_what_to_do(codebook_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            run(codebook_path, port=port, device="cpu")
    assert str(caught.value) == (
        f"Cannot listen at 127.0.0.1 port {port}: Address already in use. "
        "Pass another --port; 0 takes a free one."
    )


def test_a_host_that_is_not_ours_is_one_line(codebook_path):
    with pytest.raises(ConfigError, match=r"Cannot listen at 192\.0\.2\.1 port 0: Cannot assign"):
        run(codebook_path, host="192.0.2.1", port=0, device="cpu", insecure=True)


def test_a_missing_codebook_is_refused_before_anything_is_served(tmp_path):
    with pytest.raises(ArtifactError, match="There is no codebook at"):
        run(tmp_path / "none.safetensors", port=0)
