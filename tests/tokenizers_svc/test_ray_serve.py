"""Replicas on a real Ray of this machine: one command serves for the whole module."""

import asyncio
import os
import re
import signal
import socket

import httpx
import pytest

from cache_builder.errors import ArtifactError, ConfigError
from tests.servers import free_port
from tests.tokenizers_svc.replicas import START_S, Crowd, RayService, replicas_below
from tests.tokenizers_svc.support import (
    check_problem,
    expected_ids,
    jpeg,
    make_client,
    post,
    wait_until,
)
from tokenizers_svc import ray_proxy, ray_serve
from tokenizers_svc.options import ServiceOptions


@pytest.fixture(scope="module")
def service(codebook_path, tmp_path_factory):
    words = ("--replicas", 2, "--cpus-per-replica", 0.5)
    service = RayService(codebook_path, tmp_path_factory.mktemp("ray") / "log", *words)
    try:
        service.wait_until_it_serves()
        yield service
    finally:
        service.end()


def answer_of_the_proxy(*messages):
    """What a client gets when Ray's proxy says this by itself."""

    async def proxy(scope, receive, send):
        for message in messages:
            await send(message)

    transport = httpx.ASGITransport(ray_proxy.ProxyProblems(proxy))

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/v1/models")

    return asyncio.run(ask())


def start(status, **headers):
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}


BODY = {"type": "http.response.body", "body": b"text"}


def test_what_the_proxy_of_ray_refuses_is_a_problem_like_ours():
    full = answer_of_the_proxy(start(429, retry_after="3", x_request_id="r-1"), BODY)
    check_problem(full, 429, "overloaded")
    assert full.headers["retry-after"] == "3"
    assert full.headers["x-request-id"] == "r-1"
    for status in (404, 503):
        check_problem(answer_of_the_proxy(start(status), BODY), 503, "not-ready")
    check_problem(answer_of_the_proxy(start(408), BODY), 504, "deadline")


def test_a_request_whose_replica_died_may_be_asked_again():
    died = answer_of_the_proxy()
    check_problem(died, 503, "not-ready")
    assert died.headers["retry-after"] == "1"


def test_what_a_replica_says_passes_with_one_request_id():
    ours = start(404, x_content_type_options="nosniff", x_request_id="a", X_Request_Id="a")
    answer = answer_of_the_proxy(ours, BODY)
    assert (answer.status_code, answer.text) == (404, "text")
    assert answer.headers.get_list("x-request-id") == ["a"]


def options_of(path):
    return ServiceOptions(codebooks={"tiny": str(path)}, device="cpu")


def test_mistakes_are_told_before_ray_starts(codebook_path, tmp_path):
    alone = ray_serve.ReplicaOptions()
    with pytest.raises(ArtifactError, match="There is no codebook at"):
        ray_serve.run(options_of(tmp_path / "none"), alone, port=free_port())
    with pytest.raises(ConfigError, match="pass --port with a free one"):
        ray_serve.run(options_of(codebook_path), alone, port=0)
    with pytest.raises(ConfigError, match="--max-replicas 2 is less than the 3"):
        wanted = ray_serve.ReplicaOptions(num_replicas=3, max_replicas=2)
        ray_serve.run(options_of(codebook_path), wanted, port=free_port())
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match="Address already in use"),
    ):
        ray_serve.run(options_of(codebook_path), alone, port=taken.getsockname()[1])


@pytest.mark.ray
@pytest.mark.slow
def test_two_replicas_answer(service):
    body, births = jpeg(), set()

    def saw_both():
        with service.client() as client:
            text = client.get("/metrics").text
            births.add(re.search(r"^process_start_time_seconds (.*)$", text, re.MULTILINE)[1])
        return len(births) == 2

    with service.client() as client:
        answer = post(client, body, headers={"X-Request-Id": "mine"})
        assert answer.json()["token_ids"] == expected_ids(body)
        assert answer.headers.get_list("x-request-id") == ["mine"]
        check_problem(post(client, b"no picture"), 415, "not-an-image")
        assert client.get("/readyz").json() == {"status": "ready"}
    with make_client(service.url) as stranger:
        check_problem(post(stranger, body), 401, "unauthorized")
    assert len(replicas_below(service.process.pid)) == 2
    wait_until(saw_both)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_hurts_nobody_but_its_own_requests(service):
    before = replicas_below(service.process.pid)
    victim = min(before)
    crowd = Crowd(service)
    wait_until(lambda: len(crowd.outcomes) > 20)
    os.kill(victim, signal.SIGKILL)
    wait_until(
        lambda: (
            service.process.poll() is not None
            or len(replicas_below(service.process.pid) - {victim}) == 2
        ),
        START_S,
    )
    assert service.process.poll() is None, service.log.read_text()
    num_before = len(crowd.outcomes)
    wait_until(lambda: len(crowd.outcomes) > num_before + 20)
    crowd.leave()
    hurt = [outcome for outcome in crowd.outcomes if outcome != "right"]
    assert len(hurt) <= 3, hurt  # each client had one request on the way
    for answer in hurt:
        check_problem(answer, 503, "not-ready")
        assert answer.headers["retry-after"] == "1"


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_loses_nothing_and_exits_with_0(service):
    crowd = Crowd(service, obey=True)
    wait_until(lambda: len(crowd.outcomes) > 20)
    service.process.send_signal(signal.SIGTERM)
    with service.client() as client:
        wait_until(lambda: client.get("/readyz").status_code == 503, 60)
    assert service.process.wait(120) == 0
    crowd.leave()
    assert "right" in crowd.outcomes
    for outcome in crowd.outcomes:
        if outcome not in ("right", "refused"):
            check_problem(outcome, 503, "not-ready")
    assert "SIGTERM: finishing what has begun" in service.log.read_text()
