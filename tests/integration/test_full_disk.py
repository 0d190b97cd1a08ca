"""A disk that is full at any moment stops a build, and with more room the build goes on."""

import errno
import random
import re
import shutil
import subprocess

import pytest

from tests import factories
from tests.integration import builds

LAYOUTS = ["webdataset", "zarr"]
PAGE = 4096
AMPLE = "64m"


class Disk:
    """A file system of a size that can be changed."""

    def __init__(self, path):
        self.path = path

    def resize(self, size):
        subprocess.run(["mount", "-o", f"remount,size={size}", self.path], check=True)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={AMPLE}", "tmpfs", path],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


def assert_what_is_finished_is_whole(out, expected):
    """Check that every file that is there under its own name has its final content."""
    there = {
        name: data
        for name, data in factories.contents(out).items()
        if not name.endswith(".tmp") and name != ".lock"
    }
    assert [name for name, data in there.items() if data != expected.get(name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_at_any_moment_is_named_and_with_more_room_the_build_goes_on(
    disk, inputs, undisturbed, layout
):
    images, codebooks = inputs
    expected = undisturbed(layout)
    out = disk.path / "cache"
    options = builds.options_of(images, codebooks, out, layout=layout)
    num_pages = sum(-(-len(data) // PAGE) for data in expected.values())
    rng = random.Random(layout)
    sizes = sorted(rng.sample(range(1, num_pages), 14))
    num_full = 0
    for size in sizes:
        disk.resize(size * PAGE)
        try:
            builds.build_here(options)
        except OSError as exc:
            assert exc.errno == errno.ENOSPC  # noqa: PT017
            assert str(exc.filename).startswith(str(out))  # noqa: PT017
            num_full += 1
        assert_what_is_finished_is_whole(out, expected)
        assert not (out / "manifest.json").exists()
    assert num_full == len(sizes)
    disk.resize(AMPLE)
    builds.build_here(options)
    builds.assert_same(out, expected)


def test_a_disk_full_of_what_killed_writers_left_is_no_obstacle(disk, inputs, undisturbed):
    images, codebooks = inputs
    expected = undisturbed("webdataset")
    out = disk.path / "cache"
    options = builds.options_of(images, codebooks, out)
    builds.build_here(options)
    for name in ("shards/000003.tar", "units/000003.json", "manifest.json"):
        (out / name).unlink()
    (out / "shards/.000003.tar.0123.tmp").write_bytes(bytes(4 << 20))
    disk.resize(5 << 20)
    builds.build_here(options)
    builds.assert_same(out, expected)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_build_that_fills_the_disk_ends_in_one_line_and_the_same_command_continues_it(
    disk, inputs, undisturbed, patchcache, layout
):
    images, codebooks = inputs
    expected = undisturbed(layout)
    out = disk.path / "cache"
    words = builds.words_of(builds.options_of(images, codebooks, out, layout=layout))
    disk.resize(sum(map(len, expected.values())) // 2)
    ended = patchcache(*words)
    assert ended.status == 1
    (line,) = ended.err.splitlines()
    assert re.search(rf"No space left on device: {out}/\S+\. Mend that and run the same", line)
    assert_what_is_finished_is_whole(out, expected)
    disk.resize(AMPLE)
    assert patchcache(*words).status == 0
    builds.assert_same(out, expected)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_fit_that_fills_the_disk_ends_in_one_line_and_goes_on_from_its_sample(
    disk, tmp_path, patchcache
):
    images = factories.write_folder(tmp_path / "images", factories.photo_images(40))
    words = [
        "fit", "--images", images, "-k", 16, "--image-size", 64, "--patch-size", 4,
        "--device", "cpu", "--seed", 3,
    ]  # fmt: skip
    words += ["--sample-dir", disk.path / "sample"]
    assert patchcache(*words, "--out", tmp_path / "expected.safetensors").status == 0
    used = subprocess.run(["du", "-sB1", disk.path], capture_output=True, text=True, check=True)
    shutil.rmtree(disk.path / "sample")
    out = disk.path / "codebook.safetensors"
    # Too small for the sample; as large as the sample, so that the codebook finds no room.
    for room, full in ((10 * PAGE, r"sample/\S+"), (int(used.stdout.split()[0]), out.name)):
        disk.resize(room)
        ended = patchcache(*words, "--out", out)
        assert ended.status == 1
        assert re.search(rf"No space left on device: {disk.path}/{full}\. Mend", ended.err)
        assert not out.exists()
    disk.resize(AMPLE)
    assert patchcache(*words, "--out", out).status == 0
    assert out.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert not list(disk.path.rglob("*.tmp"))
