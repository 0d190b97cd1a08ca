"""Commands on a Ray cluster of several raylets do what they do on one machine."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest

from cache_builder import fit
from cache_builder.errors import ConfigError
from cache_builder.ray_cluster import ClusterOptions, connect
from cache_builder.tokenizers.features import FeatureOptions
from cache_builder.tokenizers.kernels.build import LIBRARY
from tests import factories
from tests.cache_builder.cluster_jobs import Job, patchcache
from tests.clusters import add_node, descendants, new_cluster, wait_for_end
from tests.places import ROOT
from tests.servers import FileServer, free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BIN = Path(sys.executable).parent
NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
"""A lost node is noticed within two seconds, not within fifteen."""


@pytest.fixture(scope="module")
def cluster():
    """Three raylets of one CPU each, as on three machines, with a dashboard that takes jobs."""
    # As on other machines, nothing of ours is there before a job brings it along.
    path = os.environ.pop("PYTHONPATH", None)
    cluster = new_cluster(
        num_cpus=1,
        include_dashboard=True,
        dashboard_port=free_port(),
        dashboard_agent_listen_port=free_port(),
        _system_config=NOTICE | {"metrics_report_interval_ms": 1000},
    )
    for _ in range(2):
        add_node(cluster, num_cpus=1)
    if path is not None:
        os.environ["PYTHONPATH"] = path
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def cluster_address(cluster):
    return cluster.address


def test_a_fit_spread_over_raylets_gives_the_bytes_of_a_fit_on_one_machine(
    tmp_path, cluster_address
):
    images = factories.write_folder(tmp_path / "photos", factories.photo_images(30))
    one, many = tmp_path / "one.safetensors", tmp_path / "many.safetensors"
    features = FeatureOptions("pixel", image_size=32, patch_size=4)
    fit.run(fit.FitOptions(str(images), one, 24, features, cluster=ClusterOptions(num_workers=0)))
    spread = patchcache(
        "fit", "--images", images, "-k", 24, "--image-size", 32, "--patch-size", 4, "--out", many,
        "--ray-address", cluster_address, "--fit-workers", 3,
    )  # fmt: skip
    assert spread.returncode == 0, spread.stderr
    assert many.read_bytes() == one.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "many.safetensors", "one.safetensors", "photos",
    ]  # fmt: skip


def test_nodes_get_the_package_with_its_kernels_and_each_warning_is_told_once(
    cluster_address, tmp_path
):
    hurry = tmp_path / "hurry"
    job = Job(cluster_address, num_units=900, seconds=0.5, hurry=str(hurry), kernels=True)
    try:
        job.wait_until(lambda: len(job.nodes) == 3)
        hurry.touch()
        status, err = job.end()
    finally:
        job.process.kill()
    assert status == 0, err
    assert job.units == list(range(900))
    packages = {line["package"] for line in job.finished}
    assert all("py_modules_files" in package for package in packages), packages
    if LIBRARY.is_file():
        assert all(line["has_kernels"] for line in job.finished)
    # On a busy machine workers may come so late that the wait for them is told as well.
    told = [line for line in err.splitlines() if not line.startswith("waiting for the cluster")]
    assert sorted(told) == sorted(f"skipped image of unit {i}" for i in range(900))


def test_a_node_that_joins_gets_units_and_those_of_a_lost_node_are_done_elsewhere(
    cluster, tmp_path
):
    # Five workers for three CPUs: two of them are pending, and hold up nothing.
    hurry = tmp_path / "hurry"
    job = Job(cluster.address, num_units=900, seconds=0.5, workers=5, hurry=str(hurry))
    try:
        job.wait_until(lambda: len(job.nodes) == 3)
        before = job.nodes
        added = add_node(cluster, num_cpus=1)
        job.wait_until(lambda: job.nodes - before)
        lost = next(line for line in job.finished if line["node"] not in before)
        cluster.remove_node(added, allow_graceful=False)
        os.kill(lost["pid"], signal.SIGKILL)  # its machine is gone, not its raylet alone
        job.wait_until(lambda: any("a worker was lost at unit" in line for line in job.err))
        hurry.touch()
        status, err = job.end()
    finally:
        job.process.kill()
    assert status == 0, err
    assert job.units == list(range(900))
    assert "a worker was lost at unit" in err


def test_a_unit_that_kills_every_worker_is_named_when_the_others_are_done(cluster_address):
    job = Job(cluster_address, num_units=30, seconds=0.3, poison=[14])
    job.wait_until(lambda: len(job.finished) > 2)
    os.kill(job.finished[-1]["pid"], signal.SIGKILL)  # one that did nothing wrong
    status, err = job.end()
    assert status == 1
    assert job.units == [unit for unit in range(30) if unit != 14]
    lost = [line for line in err.splitlines() if line.startswith("a worker was lost at")]
    assert [line.split(": ")[0] for line in lost if "unit 14; try" in line] == [
        f"a worker was lost at unit 14; try {number} of 4" for number in (1, 2, 3, 4)
    ]
    assert not [line for line in lost if "unit 14" not in line and "try 2 of 4" in line]
    last = err.splitlines()[-1]
    assert "Killed its worker 4 times and was given up: unit 14 (The actor" in last
    assert "Everything else is done and kept" in last


def test_half_a_gpu_each_puts_two_workers_on_the_node_that_brings_one(cluster):
    job = Job(cluster.address, num_units=24, seconds=0.2, workers=2, gpus=0.5, at_once=2)
    try:
        job.wait_until(lambda: job.err)
        assert re.search(r"no node has room for a worker of 1 CPUs and 0\.5 GPUs: the cluster has "
                         r"3 CPUs and 0 GPUs on 3 nodes\. Waiting for one", job.err[0])  # fmt: skip
        assert job.finished == []
        added = add_node(cluster, num_cpus=2, num_gpus=1)
        status, err = job.end()
        cluster.remove_node(added)
    finally:
        job.process.kill()
    assert status == 0, err
    assert job.units == list(range(24))
    assert len(job.nodes) == 1
    assert {tuple(line["gpus"]) for line in job.finished} == {("0",)}
    pids = {line["pid"] for line in job.finished}
    assert len(pids) == 2
    for pid in pids:
        spans = sorted(line["span"] for line in job.finished if line["pid"] == pid)
        overlaps = [after[0] < before[1] for before, after in pairwise(spans)]
        assert any(overlaps)


def test_a_build_whose_workers_have_two_units_at_hand_gives_the_same_bytes(
    tmp_path, codebook_path, cluster
):
    images = factories.write_folder(tmp_path / "photos", factories.photo_images(24))
    settings = {"images": str(images), "codebook": codebook_path, "unit_size": 2}
    added = add_node(cluster, num_cpus=4, num_gpus=1)
    done = patchcache(
        "build", "--images", images, "--codebook", codebook_path, "--out", tmp_path / "cache",
        "--unit-size", 2, "--device", "cpu", "--ray-address", cluster.address,
        "--gpus-per-worker", 0.5, "--cpus-per-worker", 2,
    )  # fmt: skip
    cluster.remove_node(added)
    assert done.returncode == 0, done.stderr
    factories.build_cache(**settings, out=tmp_path / "alone")
    for part in ("shards", "units"):
        expected = factories.contents(tmp_path / "alone" / part)
        assert factories.contents(tmp_path / "cache" / part) == expected


@pytest.fixture
def small_node(cluster, monkeypatch):
    """A node of one CPU and one GPU that has 1.5 GB of memory left, as its Ray sees it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    used = kilobytes["MemTotal"] - kilobytes["MemAvailable"]
    share = (used + 1.5e6) / kilobytes["MemTotal"]
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{share:.6f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    node = add_node(cluster, num_cpus=1, num_gpus=1)
    monkeypatch.undo()
    yield node
    cluster.remove_node(node)


@pytest.mark.usefixtures("small_node")
def test_where_memory_is_short_the_pool_gets_smaller_and_the_unit_is_done_elsewhere(
    cluster, tmp_path
):
    # The others must still have work when memory runs out: who has none has left the pool.
    hurry, units = tmp_path / "hurry", list(range(900))
    settings = {"num_units": 900, "seconds": 0.5, "workers": 4, "hungry": units}
    job = Job(cluster.address, **settings, hurry=str(hurry))
    try:
        job.wait_until(lambda: any("remain" in line for line in job.err))
        hurry.touch()
        status, err = job.end()
    finally:
        job.process.kill()
    assert status == 0, err
    assert job.units == units
    assert re.search(r"; 3 (workers )?remain: .*killed due to the node running low on memory", err)


@pytest.mark.usefixtures("small_node")
def test_a_unit_that_memory_is_too_small_for_is_given_up_with_what_to_do(cluster):
    job = Job(cluster.address, num_units=3, workers=1, gpus=1, hungry=[1], tries=2)
    try:
        status, err = job.end()
    finally:
        job.process.kill()
    assert status == 1
    last = err.splitlines()[-1]
    # Where other programs take the rest of the memory, no worker gets as far as its unit.
    assert "given up: unit 1 (" in last or "Ray workers die before they can take work" in last
    assert 1 not in job.units
    assert "running low on memory" in last
    assert "The node ran out of memory: run the same command again with fewer --workers" in last


def metrics_of(cluster):
    """Return the metrics pages of all nodes as one text, which is what Prometheus reads."""
    from ray._raylet import GcsClient

    nodes = GcsClient(address=cluster.address).get_all_node_info().values()
    pages = []
    for node in nodes:
        if node.state == 0:
            url = f"http://{node.node_manager_address}:{node.metrics_export_port}/metrics"
            with urllib.request.urlopen(url, timeout=5) as answer:
                pages.append(answer.read().decode())
    return "\n".join(pages)


def test_what_workers_count_is_on_the_metrics_pages_until_a_stop_ends_them_all(cluster):
    job = Job(cluster.address, num_units=1000, seconds=0.1)
    try:
        job.wait_until(lambda: len(job.finished) > 5)
        node = job.finished[0]["node"]
        wanted = {
            "ray_patchcache_images_total{": ('job="waiting"', f'node="{node}"'),
            "ray_patchcache_unit_seconds_bucket{": ('job="waiting"', f'node="{node}"', 'le="1.0"'),
            "ray_patchcache_workers{": ('job="waiting"',),
        }

        def is_shown():
            lines = metrics_of(cluster).splitlines()
            return all(
                any(line.startswith(name) and all(tag in line for tag in tags) for line in lines)
                for name, tags in wanted.items()
            )

        job.wait_until(is_shown)
        job.process.terminate()
        status, err = job.end()
    finally:
        job.process.kill()
    assert status == 143
    assert err.endswith("stopped; the same command continues\n")
    wait_for_end({line["pid"] for line in job.finished})


def test_a_command_that_is_sent_with_ray_job_submit_builds_a_whole_cache(
    tmp_path, codebook_path, cluster
):
    folder = tmp_path / "sent"
    factories.write_folder(folder / "photos", factories.photo_images(12))
    shutil.copy(codebook_path, folder)
    done = subprocess.run(
        [
            BIN / "ray", "job", "submit", "--address", f"http://{cluster.head_node.webui_url}",
            "--working-dir", ".", "--", "env", f"PYTHONPATH={ROOT}", BIN / "patchcache", "build",
            "--images", "photos", "--codebook", codebook_path.name, "--out", tmp_path / "cache",
            "--unit-size", "3", "--ray-address", "auto",
        ],
        cwd=folder, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "images       12, 1 views each" in done.stdout
    factories.build_cache(
        images=str(folder / "photos"), codebook=codebook_path, out=tmp_path / "alone", unit_size=3
    )
    assert factories.contents(tmp_path / "cache/shards") == factories.contents(
        tmp_path / "alone/shards"
    )


def test_an_address_that_a_driver_cannot_join_is_refused_by_name(tmp_path, codebook_path):
    with (
        pytest.raises(ConfigError, match=r"^ray://head:10001 is an address of Ray Client"),
        connect(ClusterOptions("ray://head:10001")),
    ):
        pass
    # `ray job submit` sets RAY_ADDRESS for its jobs, and people set it for `ray job submit`.
    images = factories.write_folder(tmp_path / "photos", factories.photo_images(2))
    words = ["--images", images, "--codebook", codebook_path, "--out", tmp_path / "cache"]
    done = patchcache("build", *words, environment={"RAY_ADDRESS": "http://head:8265"})
    assert done.returncode == 1
    assert "http://head:8265 is where a cluster takes jobs" in done.stderr
    assert "pass --ray-address local" in done.stderr


@pytest.mark.parametrize("process", ["gcs_server", "raylet"])
def test_a_head_node_that_is_gone_is_one_line(process):
    cluster = new_cluster(num_cpus=1, include_dashboard=False, _system_config=NOTICE)
    address = cluster.address
    job = Job(address, num_units=1000, patience=3)
    try:
        job.wait_until(lambda: job.finished)
        for gone in cluster.head_node.all_processes[process]:
            os.kill(gone.process.pid, signal.SIGKILL)
        status, err = job.end()
    finally:
        job.process.kill()
        cluster.shutdown()
    assert status == 1
    last = err.splitlines()[-1]
    assert f"The head node of the Ray cluster at {address} is gone" in last
    assert "Run the same command again" in last


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_build_that_is_stopped_says_what_is_kept_and_leaves_nothing_running(
    request, tmp_path, codebook_path, number
):
    photos = factories.photo_images(5)
    factories.write_folder(tmp_path, photos)
    server = FileServer({})  # that takes a question and never answers
    request.addfinalizer(server.close)
    server.answers.clear()
    images = tmp_path / "images.txt"
    url = server.url.replace("127.0.0.1", "localhost")  # its key comes last
    images.write_text("\n".join([*photos, f"{url}/5.jpg"]))
    words = [
        "build", "--images", images, "--codebook", codebook_path, "--out", tmp_path / "cache",
        "--unit-size", "2", "--workers", "1", "--device", "cpu", "--ray-address", "local",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "cache_builder.cli", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        started_s = time.monotonic()
        while not (tmp_path / "cache/units/000001.json").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - started_s < 120
            time.sleep(0.05)
        time.sleep(0.5)
        running = descendants(process.pid)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else 143), err
    assert out == ""
    assert "stopped after 4 of 6 images; 2 finished units are kept" in err
    assert "the same command continues" in err
    assert len(running) > 3
    wait_for_end(running)
