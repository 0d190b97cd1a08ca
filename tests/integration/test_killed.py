"""Killed is not broken: whatever dies, the same command ends with the same bytes."""

import os
import random

import pytest

from tests.integration import builds, cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, builds.KILLS_CLIENTS]


@pytest.fixture(scope="module")
def slow_inputs(tmp_path_factory):
    """Pictures whose units take a while, and two codebooks."""
    folder = tmp_path_factory.mktemp("slow_inputs")
    return (
        builds.write_images(folder / "images", size=(800, 600)),
        builds.write_codebooks(folder),
    )


NUM_VIEWS = 16


@pytest.fixture(scope="module")
def raylets(s3_server):
    """Three raylets that find the S3 server by the environment, as nodes of a cluster do."""
    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        raylets = cluster.Raylets()
        yield raylets
        raylets.stop()
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize(
    ("layout", "place", "num_codebooks", "kinds"),
    [
        ("webdataset", "local", 1, ["driver", "worker", "raylet"]),
        ("zarr", "local", 2, ["driver", "interrupt", "raylet"]),
        ("webdataset", "s3", 2, ["driver", "worker"]),
    ],
)
def test_a_build_that_is_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(
    request, tmp_path, slow_inputs, raylets, layout, place, num_codebooks, kinds
):
    images, codebooks = slow_inputs
    settings = {"layout": layout, "num_views": NUM_VIEWS}
    alone = builds.options_of(
        images, codebooks[:num_codebooks], tmp_path / "undisturbed", **settings
    )
    builds.build_here(alone)
    out = tmp_path / "cache" if place == "local" else request.getfixturevalue("bucket") + "/cache"
    words = builds.words_of(alone._replace(out=out))
    rng = random.Random(f"{layout} {place}")
    moments = cluster.draw_moments(rng, kinds)
    story = cluster.disturb(words, out, raylets, moments, rng, tmp_path / "log")
    assert len(story.happened) >= len(kinds) - 1
    builds.assert_same(out, builds.contents(tmp_path / "undisturbed"))
