"""Commands on a Ray cluster of several raylets do what they do on one machine."""

import subprocess
import sys

import pytest

from tests import factories

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster_address():
    """Three raylets of one CPU each, as on three machines."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def patchcache(*words):
    command = [sys.executable, "-m", "cache_builder.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_fit_spread_over_raylets_gives_the_bytes_of_a_fit_on_one_machine(
    tmp_path, cluster_address
):
    images = factories.write_folder(tmp_path / "photos", factories.photo_images(30))
    settings = ("--images", images, "-k", 24, "--image-size", 32, "--patch-size", 4)
    one, many = tmp_path / "one.safetensors", tmp_path / "many.safetensors"
    local = patchcache("fit", *settings, "--out", one)
    assert local.returncode == 0, local.stderr
    spread = patchcache(
        "fit", *settings, "--out", many, "--ray-address", cluster_address, "--fit-workers", 3
    )
    assert spread.returncode == 0, spread.stderr
    assert many.read_bytes() == one.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "many.safetensors", "one.safetensors", "photos",
    ]  # fmt: skip
