"""Replicas of the service on two nodes of a Ray cluster; nodes and commands get lost."""

import contextlib

import httpx
import pytest

from tests.clusters import add_node, new_cluster
from tests.servers import free_port
from tests.tokenizers_svc.replicas import START_S, Crowd, RayService, replicas_below
from tests.tokenizers_svc.support import (
    check_problem,
    expected_ids,
    jpeg,
    make_client,
    make_codebook,
    post,
    wait_until,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.hosts, pytest.mark.timeout(600)]
NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
"""A lost raylet is noticed within two seconds, not within fifteen."""


class TwoNodes:
    """A head and another node of one CPU each, whose proxies have a port each."""

    def __init__(self):
        self.other_port = free_port()
        self.cluster = new_cluster(num_cpus=1, include_dashboard=False, _system_config=NOTICE)
        self.head = self.cluster.head_node
        self.add_other()

    def add_other(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_SERVE_WORKER_PROXY_HTTP_PORT", str(self.other_port))
            self.other = add_node(self.cluster, num_cpus=1)

    def lose_other(self):
        self.cluster.remove_node(self.other, allow_graceful=False)

    def num_replicas(self):
        """Return how many replicas the head and the other node have."""
        raylets = [node.all_processes["raylet"][0].process for node in (self.head, self.other)]
        return [len(replicas_below(raylet.pid)) for raylet in raylets]


@pytest.fixture(scope="module")
def nodes():
    nodes = TwoNodes()
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture
def serve(nodes, tmp_path):
    """Start the command on the cluster."""
    codebook = tmp_path / "tiny.safetensors"
    make_codebook().save(codebook)
    started = []

    def start(**options):
        log = tmp_path / f"{len(started)}.log"
        words = ("--ray-address", nodes.cluster.address, "--replicas", 2, "--cpus-per-replica", 1)
        started.append(RayService(codebook, log, *words, **options))
        return started[-1]

    yield start
    for service in started:
        service.end()


def is_ready(url):
    with contextlib.suppress(httpx.TransportError), make_client(url) as client:
        return client.get("/readyz").status_code == 200
    return False


def check_answers(service, url=None):
    with service.client(url) as client, make_client(url or service.url) as stranger:
        for seed in range(6):
            body = jpeg(seed=seed)
            assert post(client, body).json()["token_ids"] == expected_ids(body)
        check_problem(post(stranger, body), 401, "unauthorized")


def test_replicas_of_two_nodes_answer_alike_and_a_lost_node_hurts_only_what_it_had(nodes, serve):
    service = serve()
    service.wait_until_it_serves()
    wait_until(lambda: nodes.num_replicas() == [1, 1], START_S)
    check_answers(service)
    other_url = f"http://127.0.0.1:{nodes.other_port}"
    wait_until(lambda: is_ready(other_url), START_S)
    check_answers(service, other_url)
    crowd = Crowd(service)
    wait_until(lambda: len(crowd.outcomes) > 20)
    nodes.lose_other()
    num_before = len(crowd.outcomes)
    wait_until(lambda: len(crowd.outcomes) > num_before + 20, 60)
    nodes.add_other()
    wait_until(lambda: nodes.num_replicas() == [1, 1], START_S)
    crowd.leave()
    hurt = [outcome for outcome in crowd.outcomes if outcome != "right"]
    assert len(hurt) <= 3, hurt  # each client had one request on the way
    for answer in hurt:
        check_problem(answer, 503, "not-ready")
    service.process.terminate()
    assert service.process.wait(120) == 0, service.log.read_text()


def test_a_second_command_is_refused_and_replicas_outlive_one_that_is_killed(serve):
    first = serve()
    first.wait_until_it_serves()
    refused = serve()
    assert refused.process.wait(START_S) == 1
    assert "Another `patchcache serve --ray` runs on this cluster" in refused.log.read_text()
    check_answers(first)
    first.process.kill()
    first.process.wait()
    check_answers(first)
