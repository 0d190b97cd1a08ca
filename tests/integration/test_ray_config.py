"""The application of deploy/ray/service, deployed as KubeRay does it: one PUT to the dashboard."""

import json
import time
import urllib.request

import httpx
import pytest
import yaml

from tests.clusters import new_cluster
from tests.deploy.objects import load
from tests.servers import free_port
from tests.tokenizers_svc.support import check_problem, expected_ids, jpeg, make_codebook

pytestmark = pytest.mark.hosts

KEY = "k" * 32
START_S = 250


@pytest.fixture
def config(tmp_path):
    """What the file says, with the paths and the port of this machine."""
    config = yaml.safe_load(load("ray/service/service.yaml")["spec"]["serveConfigV2"])
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    told = config["applications"][0]["args"]["service"]
    make_codebook().save(tmp_path / "codebook.safetensors")
    (tmp_path / "keys").write_text(f"{KEY} somebody\n")
    told["codebooks"] = {"photos": str(tmp_path / "codebook.safetensors")}
    told["access"] = {"key_file": str(tmp_path / "keys")}
    return config


@pytest.fixture
def dashboard(monkeypatch):
    """The dashboard of a cluster that says it has room for the replicas."""
    module = "tokenizers_svc.ray_proxy.proxy_middleware"
    monkeypatch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", module)
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    port = free_port()
    cluster = new_cluster(
        num_cpus=8, include_dashboard=True, dashboard_port=port,
        dashboard_agent_listen_port=free_port(),
    )  # fmt: skip
    yield f"http://127.0.0.1:{port}"
    cluster.shutdown()


def ask(url, data=None):
    request = urllib.request.Request(
        url, json.dumps(data).encode() if data else None, {"Content-Type": "application/json"},
        method="PUT" if data else "GET",
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or "null")


def test_the_application_of_the_rayservice_serves_those_with_a_key(config, dashboard):
    applications = f"{dashboard}/api/serve/applications/"
    ask(applications, config)
    started_s = time.monotonic()
    while (state := ask(applications)["applications"]["patchcache"])["status"] != "RUNNING":
        assert state["status"] == "DEPLOYING", state
        assert time.monotonic() - started_s < START_S, state
        time.sleep(0.5)
    (deployment,) = state["deployments"].values()
    assert len(deployment["replicas"]) == 2
    url, body = f"http://127.0.0.1:{config['http_options']['port']}", jpeg()
    with httpx.Client(base_url=url, timeout=60) as client:
        check_problem(client.post("/v1/tokenize", content=body), 401, "unauthorized")
        client.headers["Authorization"] = f"Bearer {KEY}"
        answer = client.post("/v1/tokenize", content=body)
        assert answer.json()["token_ids"] == expected_ids(body)
        assert client.get("/-/healthz").status_code == 200
