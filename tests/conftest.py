"""Fixtures that every package's tests share."""

import json
import logging
import os
import signal
import urllib.request
import uuid
from typing import NamedTuple

import pytest
from _pytest.nodeid import NodeId
from hypothesis import HealthCheck, settings

from tests import factories
from tests.places import DATA, ROOT
from tests.servers import GoogleStorage

CLUSTERS = "clusters"
FIRST = pytest.StashKey()  # the test that a worker of pytest-xdist began with


def pytest_configure():
    # A shell starts what it puts into the background with Ctrl-C ignored, and that is inherited.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Ray's workers are nice to other processes by default, and starve on a busy machine.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    # The same examples every time, and however long they take on a busy machine.
    settings.register_profile(
        "calm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("calm")


def pytest_collection_modifyitems(config, items):
    """Say which tests a worker of pytest-xdist takes together, and in which order.

    Clusters of real processes run one after the other, in one worker, while the other workers run
    the rest. Of the rest a file stays together: what its fixtures make is made once. What needs no
    more than the one Ray of its process comes last: whichever worker is free takes it.
    """
    parts = {item: part_of(item) for item in items}
    items.sort(key=parts.__getitem__)
    if getattr(config.option, "loadgroup", False):
        for item, part in parts.items():
            file = item.nodeid.partition("::")[0]
            group = {0: CLUSTERS, 1: file, 2: f"{file} at the end"}[part]
            # What the marker `xdist_group` would do, which pytest 9.2 and pytest-xdist 3.8 lost.
            item._id = NodeId.parse(f"{item.nodeid}@{group}")


def part_of(item):
    """Return 0 for tests of clusters of their own, 2 for those of `ray_cluster`, 1 for the rest."""
    if "ray_cluster" in item.fixturenames:
        return 2
    is_marked = item.get_closest_marker("ray") or item.get_closest_marker("cluster")
    return 0 if is_marked or ROOT / "tests/integration" in item.path.parents else 1


def pytest_runtest_protocol(item):
    """Let clusters, whose processes must start within seconds, go before the other tests."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if is_worker and item.config.stash.setdefault(FIRST, item) is item:
        os.nice(10 if part_of(item) else 0)


def pytest_runtest_setup(item):
    if item.get_closest_marker("network") and "network" not in item.config.option.markexpr:
        pytest.skip("downloads weights or data; ask for it with -m network")
    if item.get_closest_marker("hosts") and "hosts" not in item.config.option.markexpr:
        pytest.skip("takes minutes and a machine; `make integration` runs it")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors are small here; threads that wait for each other on a busy machine only cost."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray of two CPUs for all tests; `map_units` joins a Ray that is already running."""
    import ray

    from cache_builder.ray_cluster import start_patiently

    start_patiently(
        lambda: ray.init(
            address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR,
            log_to_driver=False,
        ),
        ray.shutdown,
    )  # fmt: skip
    yield ray
    ray.shutdown()


class Outcome(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def patchcache(monkeypatch, capsys):
    """Run the command line in this process, where torch is loaded and Ray is running."""
    from cache_builder import cli

    def run(*words):
        monkeypatch.setattr("sys.argv", ["patchcache", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as exc:
            status = exc.code or 0
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def codebook_path(tmp_path):
    """A pixel codebook of six colours: patches of 4 pixels, 4 x 4 of them."""
    return factories.write_codebook(tmp_path / "codebook.safetensors")


def _data(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there; PATCHCACHE_TEST_DATA may name its folder")
    return path


@pytest.fixture(scope="session")
def photos():
    """250 ImageNet photographs, flat."""
    return _data("photos")


@pytest.fixture(scope="session")
def cifar_tar():
    """CIFAR-10 as JPEGs in one tar."""
    return _data("cifar10-25k.tar")


@pytest.fixture(scope="session")
def mobilenet_weights():
    """Weights of a real ImageNet encoder, timm's mobilenetv2_100."""
    return _data("weights/mobilenetv2_100.same.fp16.safetensors")


@pytest.fixture(scope="session")
def s3_server():
    """A local server that speaks S3's protocol; returns its URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """An empty bucket, `s3://...`, that every client finds by the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    urllib.request.urlopen(
        urllib.request.Request(f"{s3_server}/{name}", method="PUT"), timeout=10
    ).close()
    return f"s3://{name}"


@pytest.fixture
def google_bucket(tmp_path, monkeypatch):
    """An empty bucket, `gs://...`, that obstore finds by the environment."""
    server = GoogleStorage("bucket")
    account = tmp_path / "account.json"
    account.write_text(
        json.dumps(
            {"gcs_base_url": server.url, "disable_oauth": True, "client_email": "",
             "private_key": "", "private_key_id": ""}
        )
    )  # fmt: skip
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
    yield "gs://bucket"
    server.close()
