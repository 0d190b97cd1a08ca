"""deploy/ray against KubeRay's fields, Ray's own schemas and our command line."""

import copy
import re
import shlex
import warnings

import pytest
import yaml
from pydantic import ValidationError

from cache_builder.errors import ConfigError
from tests.deploy.commands import parse_patchcache, parse_ray, shown_in
from tests.deploy.kuberay import RayJob, RayService
from tests.deploy.objects import DEPLOY, check_is_confined, kustomize, load
from tokenizers_svc import ray_proxy, ray_serve

RAY = DEPLOY / "ray"


@pytest.fixture(scope="module")
def job():
    return load("ray/build/job.yaml")


@pytest.fixture(scope="module")
def service():
    return load("ray/service/service.yaml")


@pytest.fixture(scope="module", autouse=True)
def ray_serve_is_imported():
    """Import Ray Serve, which warns of its own use of pydantic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.serve.schema  # noqa: F401


def pods_of(cluster):
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def check_cluster(cluster):
    """Check what KubeRay does not: versions, rights, probes."""
    pinned = (DEPLOY / "constraints.txt").read_text()
    assert f"\nray=={cluster['rayVersion']}\n" in pinned
    for pod in pods_of(cluster):
        check_is_confined(pod)
        # Those that KubeRay adds where there are none run wget, which slim images lack.
        for probe in ("readinessProbe", "livenessProbe"):
            assert "httpGet" in pod["containers"][0][probe]


def test_the_build_is_a_rayjob(job):
    RayJob.model_validate(job)
    check_cluster(job["spec"]["rayClusterSpec"])


@pytest.mark.parametrize(
    "change",
    [
        {"entryPoint": "x"},
        {"backoffLimit": "3"},
        {"backoffLimit": -1},
        {"backoffLimit": 2**31},
        {"ttlSecondsAfterFinished": 60, "shutdownAfterJobFinishes": False},
    ],
)
def test_what_kuberay_does_not_know_or_refuses_is_noticed(job, change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        RayJob.model_validate(job | {"spec": job["spec"] | change})


@pytest.mark.parametrize("name", ["Build", "1-build", "build-", "b" * 48])
def test_a_name_that_kuberay_refuses_is_noticed(job, name):
    with pytest.raises(ValidationError, match="name"):
        RayJob.model_validate(job | {"metadata": {"name": name}})


def test_a_group_that_cannot_be_is_noticed(job):
    job = copy.deepcopy(job)
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"] = 9
    with pytest.raises(ValidationError, match="more than maxReplicas"):
        RayJob.model_validate(job)


def test_a_mistake_in_a_pod_of_kuberay_is_noticed(job):
    job = copy.deepcopy(job)
    pods_of(job["spec"]["rayClusterSpec"])[1]["containers"][0]["volumeMount"] = []
    with pytest.raises(ValidationError, match="volumeMount"):
        RayJob.model_validate(job)


def test_the_builds_workers_find_room_in_their_groups(job):
    commands = [job["spec"]["entrypoint"]]
    for item in load("ray/build-gpu/kustomization.yaml")["patches"]:
        commands += [change["value"] for change in yaml.safe_load(item["patch"])]
    groups = {
        group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }
    for command, group in zip(commands, (groups["cpu"], groups["gpu"]), strict=True):
        name, options = parse_patchcache(shlex.split(command))
        assert (name, options["ray_address"]) == ("build", "auto")
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        places = int(limits["cpu"]) // options["cpus_per_worker"]
        if options["gpus_per_worker"]:
            places = min(places, limits["nvidia.com/gpu"] // options["gpus_per_worker"])
        assert options["workers"] == places * group["maxReplicas"]


def test_the_service_is_a_rayservice(service):
    RayService.model_validate(service)
    check_cluster(service["spec"]["rayClusterConfig"])


def serve_config(service):
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    # The schemas let pass what they do not know.
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    (application,) = config["applications"]
    assert application.keys() <= ServeApplicationSchema.model_fields.keys()
    return ServeDeploySchema.model_validate(config)


def built(arguments):
    """Do what Ray Serve does with an application of a config."""
    from ray._common.utils import import_attr
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    builder = import_attr("tokenizers_svc.ray_application:application")
    return call_user_app_builder_with_args_if_necessary(builder, arguments)


def test_ray_serve_builds_the_application_of_the_rayservice(service, codebook_path, tmp_path):
    (application,) = serve_config(service).applications
    assert application.import_path == "tokenizers_svc.ray_application:application"
    arguments = copy.deepcopy(application.args)
    head = pods_of(service["spec"]["rayClusterConfig"])[0]["containers"][0]
    mounts = {mount["mountPath"] for mount in head["volumeMounts"]}
    told = arguments["service"]
    files = (*told["codebooks"].values(), told["access"]["key_file"])
    assert {path.rpartition("/")[0] for path in files} <= mounts
    (tmp_path / "keys").write_text("k" * 32)
    told["codebooks"] = {"photos": str(codebook_path)}
    told["access"] = {"key_file": str(tmp_path / "keys")}
    deployment = built(arguments)._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 8)
    assert deployment.ray_actor_options["num_cpus"] == 4


def test_each_replica_of_the_rayservice_finds_room(service):
    (application,) = serve_config(service).applications
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["cpu"]) == application.args["cpus_per_replica"]
    assert group["minReplicas"] == application.args["num_replicas"]
    assert group["maxReplicas"] == application.args["max_replicas"]


def test_an_application_of_a_config_is_refused_without_keys_and_with_mistakes(codebook_path):
    arguments = {"service": {"codebooks": {"photos": str(codebook_path)}}}
    with pytest.raises(ConfigError, match="it has no keys"):
        built(arguments)
    assert built(arguments | {"insecure": True})
    with pytest.raises(ConfigError, match="--max-replicas 2 is less than the 3"):
        built(arguments | {"insecure": True, "num_replicas": 3, "max_replicas": 2})
    with pytest.raises(ValidationError, match="replicas"):
        built(arguments | {"replicas": 3})


def test_rays_proxy_is_told_where_our_words_are(service):
    ours = ray_proxy.proxy_middleware
    for pod in pods_of(service["spec"]["rayClusterConfig"]):
        variables = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
        assert variables[ray_serve._PROXY_CALLBACK] == f"{ours.__module__}.{ours.__name__}"


@pytest.mark.parametrize("name", ["build", "build-gpu", "service"])
def test_kustomize_takes_what_kuberay_gets(name):
    objects = kustomize(RAY / name)
    kind = RayService if name == "service" else RayJob
    (item,) = [item for item in objects.values() if item["kind"] == kind.__name__]
    kind.model_validate(item)
    images = set(re.findall(r"image: (\S+)", yaml.safe_dump(item)))
    ray = {"patchcache-builder:0.1.0", "patchcache-service:0.1.0-ray"}
    assert images == (ray if name == "service" else {"patchcache-builder:0.1.0"})
    if name == "service":
        (config,) = [name for kind, name in objects if kind == "ConfigMap"]
        for pod in pods_of(item["spec"]["rayClusterConfig"]):
            assert pod["initContainers"][0]["envFrom"][0]["configMapRef"]["name"] == config


@pytest.mark.parametrize("name", ["aws", "local"])
def test_rays_launcher_takes_the_clusters(name, monkeypatch, tmp_path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setenv("HOME", str(tmp_path))  # where the launcher keeps what it knows
    path = RAY / f"cluster-{name}.yaml"
    validate_config(prepare_config(yaml.safe_load(path.read_text())))
    shown = [parse_ray(words) for words in shown_in(path, "ray")]
    assert [command for command, _ in shown if command != "exec"] == ["up", "down"]
    for command, options in shown:
        assert options["cluster_config_file"] == path.name
        if command == "exec":
            ours, told = parse_patchcache(shlex.split(options["cmd"]))
            assert (ours, told["ray_address"]) == ("build", "auto")
