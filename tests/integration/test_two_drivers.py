"""Two drivers on one output: the second is refused by name, and comes in when the first is dead."""

import os
import re
import socket

import pytest

from cache_builder import object_store
from cache_builder.stores import open_store
from tests.integration import builds

pytestmark = [pytest.mark.ray, pytest.mark.slow, builds.KILLS_CLIENTS]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_second_driver_is_refused_by_name_until_the_first_is_killed(
    request, tmp_path, inputs, monkeypatch, place
):
    monkeypatch.setattr(object_store, "_BEAT_S", 0.2)
    monkeypatch.setattr(object_store, "_LOST_AFTER_S", 1.0)
    _, codebooks = inputs
    images = builds.write_images(tmp_path / "images")
    # The first driver gets no further than this unit: its file never gives its content.
    waits = images / "b/059.jpg"
    content = waits.read_bytes()
    waits.unlink()
    os.mkfifo(waits)
    out = tmp_path / "cache" if place == "local" else request.getfixturevalue("bucket") + "/cache"
    options = builds.options_of(images, codebooks, out)
    words = builds.words_of(options)
    drivers = [builds.start(words, tmp_path / "first.log")]
    (first,) = drivers
    try:
        builds.wait_for(lambda: open_store(out).exists("plan.json") or first.poll() is not None)
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        drivers.append(builds.start(words, tmp_path / "second.log"))
        assert drivers[1].wait(builds.TIMEOUT_S) == 1
        assert first.poll() is None
    finally:
        for driver in drivers:
            builds.kill(driver)
    *waits_for, line = (tmp_path / "second.log").read_text().splitlines()
    assert len(waits_for) == (place == "s3")  # it says that it looks for signs of life
    holder = f"process {first.pid} on {re.escape(socket.gethostname())}"
    assert re.search(rf"patchcache build: {out} is being written by {holder}\. Wait for it", line)
    waits.unlink()
    waits.write_bytes(content)
    builds.build_here(options)
    assert open_store(out).exists("manifest.json")
    assert not open_store(out).exists(".lock")
    # What the killed driver's workers may still write are the same bytes.
    alone = builds.options_of(images, codebooks, tmp_path / "alone")
    builds.build_here(alone)
    builds.assert_same(out, builds.contents(alone.out))
