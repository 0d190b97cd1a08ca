"""Two drivers on one output: the second is refused by name, and comes in when the first is dead."""

import re
import socket

import pytest

from cache_builder import object_store
from cache_builder.stores import open_store
from tests.integration import builds
from tests.servers import FileServer

pytestmark = [pytest.mark.ray, pytest.mark.slow, builds.KILLS_CLIENTS]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_second_driver_is_refused_by_name_until_the_first_is_killed(
    request, tmp_path, inputs, monkeypatch, place
):
    monkeypatch.setattr(object_store, "_BEAT_S", 0.2)
    monkeypatch.setattr(object_store, "_LOST_AFTER_S", 1.0)
    _, codebooks = inputs
    folder = builds.write_images(tmp_path / "images")
    *names, last = sorted(str(path.relative_to(tmp_path)) for path in folder.rglob("*.jpg"))
    # The first driver gets no further than this unit: the server does not answer.
    server = FileServer({"last.jpg": (tmp_path / last).read_bytes()})
    request.addfinalizer(server.close)
    server.answers.clear()
    images = tmp_path / "images.txt"
    url = server.url.replace("127.0.0.1", "localhost")  # its key comes last
    images.write_text("\n".join([*names, f"{url}/last.jpg"]))
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
    server.answers.set()
    builds.build_here(options)
    assert open_store(out).exists("manifest.json")
    assert not open_store(out).exists(".lock")
    # What the killed driver's workers may still write are the same bytes.
    alone = builds.options_of(images, codebooks, tmp_path / "alone")
    builds.build_here(alone)
    builds.assert_same(out, builds.contents(alone.out))
