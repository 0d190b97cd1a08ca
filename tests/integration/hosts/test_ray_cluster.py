"""A Ray cluster of hosts: one is cut off while a job builds a cache on object storage."""

import json
import re
from pathlib import Path

import httpx
import pytest

from cache_builder import build_log
from cache_builder.ray_cluster import start_patiently
from cache_builder.stores import open_store
from tests.integration import builds
from tests.integration.hosts import storage
from tests.integration.hosts.network import network

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("hosts_are_possible"),
]

RAY = ["-m", "ray.scripts.scripts"]
PORT = 6379
JOB_SERVER = "http://head:8265"
TOKEN = "a-token-of-these-tests-0123456789abcdef"
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    # The machine may be busy.
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "120",
    # Long enough for a host that is cut off to be there still when the build has ended.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}
# A lost node is noticed within a few seconds, not within fifteen.
NOTICE = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
NUM_VIEWS = 16
UNIT_SIZE = 2
SLOW = 500_000  # bits per second out of the storage, so that a build takes a while


class RayHosts:
    """A head and further nodes, of one CPU each."""

    def __init__(self, hosts, folder):
        self.head, *self.others = hosts
        self._folder = folder
        for host in hosts:
            host.give_environment(ENVIRONMENT)
            # Ray keeps sockets and the address of the last cluster there.
            host.give_place(Path("/tmp/ray"), folder / host.name)
        self._start(
            self.head,
            *("--head", "--port", PORT, "--dashboard-host", self.head.address),
            *("--system-config", json.dumps(NOTICE)),
        )
        for host in self.others:
            self._start(host, "--address", f"{self.head.address}:{PORT}")
        builds.wait_for(lambda: len(self._alive()) == len(hosts))

    def log(self, host):
        return (self._folder / f"{host.name}.log").read_text()

    def _start(self, host, *words):
        place = ["--node-ip-address", host.address, "--num-cpus", 1]
        size = ["--object-store-memory", 100_000_000, "--disable-usage-stats", "--block"]
        command = [*RAY, "start", *words, *place, *size]

        def start():
            process = host.start_python(command, self._folder / f"{host.name}.log")
            builds.wait_for(
                lambda: "Ray runtime started" in self.log(host) or process.poll() is not None
            )
            assert process.poll() is None, self.log(host)

        start_patiently(start, host.kill)

    def _alive(self):
        """Return the addresses of nodes that the head believes to be there."""
        url = f"http://{self.head.address}:8265/nodes?view=summary"
        answer = httpx.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
        answer.raise_for_status()
        nodes = answer.json()["data"]["summary"]
        return [n["ip"] for n in nodes if n["raylet"].get("state") == "ALIVE"]


def is_at_work(host):
    return any(command.startswith("ray::UnitActor") for command in host.processes().values())


def test_a_host_that_is_cut_off_in_mid_build_changes_no_byte_and_neither_does_its_return(
    tmp_path, monkeypatch
):
    source = builds.write_images(tmp_path / "images", size=(800, 600))
    codebooks = builds.write_codebooks(tmp_path)
    with network("desk", "storage", "head", "one", "two") as (desk, disk, *hosts):
        storage.start(disk, hosts, tmp_path, monkeypatch)
        store = open_store(storage.BUCKET)
        for path in sorted(source.rglob("*.jpg")):
            store.publish(f"images/{path.relative_to(source).as_posix()}", path.read_bytes())
        images, out = f"{storage.BUCKET}/images", f"{storage.BUCKET}/cache"
        settings = {"num_views": NUM_VIEWS, "unit_size": UNIT_SIZE}
        alone = builds.options_of(images, codebooks, tmp_path / "alone", **settings)
        builds.build_here(alone)
        expected = builds.contents(alone.out)

        ray = RayHosts(hosts, tmp_path)
        disk.slow_down(SLOW)
        desk.give_environment(ENVIRONMENT)
        submit = [*RAY, "job", "submit", "--address", JOB_SERVER, "--"]
        command = ["patchcache", *builds.words_of(alone._replace(out=out))]
        place = ["--ray-address", "auto", "--workers", len(hosts)]
        job = desk.start_python([*submit, *command, *place], tmp_path / "job.log")

        def told():
            return (tmp_path / "job.log").read_text()

        lost = ray.others[-1]
        written = f'{lost.address} - - .* "PUT /bucket/cache/units/'
        asked = tmp_path / "storage.log"
        builds.wait_for(
            lambda: re.search(written, asked.read_text()) is not None or job.poll() is not None
        )
        assert job.poll() is None, told()
        assert is_at_work(lost)
        lost.pull_cable()
        disk.slow_down(0)
        assert job.wait(builds.TIMEOUT_S) == 0, told()
        assert is_at_work(lost)  # as far as it knows
        builds.assert_same(out, expected)
        (run,) = build_log.read(out)
        assert {host.name for host in hosts if host is not lost} <= set(run.hosts)

        lost.plug_in()
        builds.wait_for(lambda: not is_at_work(lost))  # it learns that it was given up
        builds.assert_same(out, expected)
