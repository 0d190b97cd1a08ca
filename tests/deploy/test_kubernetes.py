"""deploy/kubernetes against Kubernetes' own schemas, and against what the service really does."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from cache_builder.formats import Codebook
from tests.deploy.kuberay import check_object
from tests.deploy.objects import DEPLOY, check_is_confined, command_of, kustomize, load
from tests.deploy.slurm import record
from tests.documents.blocks import texts_of
from tests.tokenizers_svc.support import make_tokenizer, serving
from tokenizers_svc.access import Access, AccessOptions
from tokenizers_svc.app import create_app
from tokenizers_svc.options import ServiceOptions, name_codebooks, read_limits

KUBERNETES = DEPLOY / "kubernetes"
PAGE = DEPLOY.parent / "docs/platforms.md"
KEY = "k" * 32
STRANGE = ("kustomization.yaml", "service-monitor.yaml")  # kinds that Kubernetes does not know
FILES = sorted(p for p in KUBERNETES.rglob("*.yaml") if p.name not in STRANGE)


@pytest.fixture(scope="module")
def deployment():
    return load("kubernetes/service/deployment.yaml")


@pytest.fixture(scope="module")
def pod(deployment):
    return deployment["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def arguments(pod):
    """Options of `patchcache serve`."""
    name, options = command_of(pod["containers"][0])
    assert name == "serve"
    return options


@pytest.fixture(scope="module")
def client():
    """A service with keys."""
    options = ServiceOptions(access=AccessOptions(keys=[KEY]))
    with serving(create_app(make_tokenizer(), options=options)) as client:
        yield client


def blocks_of_the_page():
    """What docs/platforms.md shows: a kustomization, and a rule of an adapter of metrics."""
    return texts_of(PAGE, "yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_object_is_what_kubernetes_takes(path):
    check_object(yaml.safe_load(path.read_text()))


def test_what_kubernetes_does_not_know_is_noticed(deployment):
    deployment = deployment | {"spec": deployment["spec"] | {"replica": 2}}
    with pytest.raises(Exception, match="replica"):
        check_object(deployment)


@pytest.mark.parametrize("path", ["service/deployment.yaml", "build/job.yaml"])
def test_pods_run_as_nobody_and_write_nowhere_but_to_their_volumes(path):
    check_is_confined(load(f"kubernetes/{path}")["spec"]["template"]["spec"])


def test_the_service_is_told_what_it_understands(arguments, pod):
    assert arguments["host"] == "0.0.0.0"
    (port,) = pod["containers"][0]["ports"]
    assert arguments["port"] == port["containerPort"]
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    (codebook,) = name_codebooks(arguments["codebook"]).values()
    assert {codebook.rpartition("/")[0], str(arguments["key_file"].parent)} <= mounts
    (keys,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert [item["path"] for item in keys["items"]] == [arguments["key_file"].name]
    assert read_limits(arguments["limit"]).lanes == 4


def test_a_pod_is_given_the_time_that_the_service_takes_to_end(arguments, pod):
    limits = read_limits(arguments["limit"])
    assert pod["terminationGracePeriodSeconds"] == limits.drain_s + limits.request_deadline_s + 5
    probe = pod["containers"][0]["readinessProbe"]
    assert probe["periodSeconds"] * (probe["failureThreshold"] + 1) < limits.drain_s


def test_probes_ask_for_what_is_answered_without_a_key(client, pod):
    service = pod["containers"][0]
    paths = {
        probe: service[probe]["httpGet"]["path"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths["livenessProbe"] == "/healthz"
    for path in paths.values():
        assert client.get(path).status_code == 200
    assert client.get("/v1/models").status_code == 401


def test_the_codebook_is_fetched_as_it_is(pod, codebook_path, tmp_path, monkeypatch):
    (fetching,) = pod["initContainers"]
    (program, option), (code, url, target) = fetching["command"], fetching["args"]
    assert (program, option, url) == ("python", "-c", "$(CODEBOOK_URL)")
    (served,) = name_codebooks(command_of(pod["containers"][0])[1]["codebook"]).values()
    assert served == target
    monkeypatch.setattr(sys, "argv", [option, str(codebook_path), str(tmp_path / "copy")])
    exec(compile(code, target, "exec"), {})
    copy, original = Codebook.load(tmp_path / "copy"), Codebook.load(codebook_path)
    assert copy.fingerprint == original.fingerprint


def test_all_that_is_beside_the_pods_means_them(deployment, pod):
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    service, policy, budget, scaler = (
        load(f"kubernetes/service/{name}.yaml")["spec"]
        for name in ("service", "network-policy", "disruption-budget", "autoscaler")
    )
    assert deployment["spec"]["selector"] == budget["selector"] == {"matchLabels": labels}
    assert policy["podSelector"] == {"matchLabels": labels}
    assert service["selector"] == labels
    scaled = scaler["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", deployment["metadata"]["name"])
    (port,) = pod["containers"][0]["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    assert policy["ingress"][0]["ports"] == [{"port": port["name"], "protocol": "TCP"}]


def test_prometheus_finds_the_metrics_with_a_key(client):
    monitor = load("kubernetes/monitoring/service-monitor.yaml")
    assert (monitor["apiVersion"], monitor["kind"]) == (
        "monitoring.coreos.com/v1",
        "ServiceMonitor",
    )
    service = load("kubernetes/service/service.yaml")
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint.keys() == {"port", "path", "interval", "authorization"}
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert client.get(endpoint["path"]).status_code == 401
    metrics = client.get(endpoint["path"], headers={"Authorization": f"Bearer {KEY}"}).text
    patch = load("kubernetes/monitoring/kustomization.yaml")["patches"][0]["patch"]
    (operation,) = yaml.safe_load(patch)
    metric = operation["value"]["pods"]["metric"]["name"]
    assert f"\n{metric} 0" in metrics
    (rule,) = yaml.safe_load(blocks_of_the_page()[1])["rules"]
    assert rule["name"] == {"as": metric}
    assert rule["seriesQuery"].startswith(f"{metric}{{")


def test_the_page_makes_the_keys_that_the_service_and_prometheus_read(tmp_path):
    (block,) = [text for text in texts_of(PAGE, "bash") if "client-key" in text]
    record(tmp_path, "kubectl")
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, check=True)
    access = Access(AccessOptions(key_file=tmp_path / "keys"))
    assert access.find((tmp_path / "client-key").read_text()).name == "somebody"
    assert access.find((tmp_path / "metrics-key").read_text()).name == "prometheus"
    create, apply = map(json.loads, (tmp_path / "commands").read_text().splitlines())
    monitor = load("kubernetes/monitoring/service-monitor.yaml")["spec"]["endpoints"][0]
    read = monitor["authorization"]["credentials"]
    assert create[2:6] == ["create", "secret", "generic", read["name"]]
    assert f"--from-file={read['key']}" in create
    assert (DEPLOY.parent / apply[-1] / "kustomization.yaml").is_file()


def test_the_build_is_told_what_it_understands():
    (container,) = load("kubernetes/build/job.yaml")["spec"]["template"]["spec"]["containers"]
    name, options = command_of(container)
    assert name == "build"
    assert (options["ray_address"], options["workers"]) == ("local", 4)


def test_kustomize_puts_service_gpu_and_monitoring_together(tmp_path):
    (tmp_path / "deploy").symlink_to(DEPLOY)
    (tmp_path / "kustomization.yaml").write_text(blocks_of_the_page()[0])
    objects = kustomize(tmp_path)
    for item in objects.values():
        if item["kind"] != "ServiceMonitor":
            check_object(item)
    pod = objects["Deployment", "patchcache-service"]["spec"]["template"]["spec"]
    check_is_confined(pod)
    service = pod["containers"][0]
    assert service["image"] == "registry.example.org/patchcache-service:0.1.0"
    assert command_of(service)[1]["device"] == "cuda"
    assert service["resources"]["limits"]["nvidia.com/gpu"] == 1
    # The ConfigMap's name has a digest of its content, and the pods mean that one.
    (name,) = [name for kind, name in objects if kind == "ConfigMap"]
    assert pod["initContainers"][0]["envFrom"][0]["configMapRef"]["name"] == name
    metrics = objects["HorizontalPodAutoscaler", "patchcache-service"]["spec"]["metrics"]
    assert [metric["type"] for metric in metrics] == ["Resource", "Pods"]


def test_kustomize_takes_the_build():
    objects = kustomize(KUBERNETES / "build")
    check_object(objects["Job", "patchcache-build"])
