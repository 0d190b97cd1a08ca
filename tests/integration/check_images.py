"""Make each image's environment as its Dockerfile does, and run it as a container would.

python -m tests.integration.check_images [builder] [service] [trainer] [--scratch DIR]

On Linux, as root; no Docker. What an image would hold is made in DIR/IMAGE and kept for the next
run. Its entry point then runs as user 10001 without capabilities, in namespaces of its own: the
root file system is read-only, /tmp is empty, nothing of the environment is inherited, and only
DIR/cache and DIR/work, which stand for /cache and /work, can be written. Each image does its main
job on pictures that are drawn here. What the builder leaves in DIR/work the others use; where it
has left nothing, that is made here without an image.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from cache_builder.formats.manifest import MANIFEST_NAME
from tests import factories
from tests.deploy.dockerfiles import IMAGES, Dockerfile, context
from tests.places import ROOT

USER = 10001
KEY = "the-key-of-this-check-alone"
START_S = 300
FIT = (
    "fit", "--images", "photos", "-k", "16", "--image-size", "32", "--patch-size", "8",
    "--iterations", "5", "--out", "photos.safetensors",
)  # fmt: skip
BUILD = ("build", "--images", "photos", "--codebook", "photos.safetensors", "--views", "2")
HERE = ("--workers", "0", "--out", "cache")
SETUP = """
set -e
ip link set lo up
mount --make-rprivate /
mount --bind "$1" "$1"
mount --bind "$2" "$2"
mount -t tmpfs -o size=2g,mode=1777 tmpfs /tmp
if [ "$4" ]; then  # Python lies in a folder that is closed to others: nothing else is left there
    mkdir /tmp/python
    mount --bind "$3" /tmp/python
    mount -t tmpfs -o mode=755 tmpfs "$4"
    mkdir -p "$3"
    mount --move /tmp/python "$3"
    rmdir /tmp/python
    mount -o remount,ro "$4"
fi
mount -o remount,bind,ro /
cd "$2"
shift 4
exec "$@"
"""
ABSENT = {
    "builder": ("fastapi", "uvicorn", "tensorboard", "faiss"),
    "service": ("ray", "pyarrow", "tensorboard", "faiss"),
    "trainer": ("ray", "faiss", "fastapi", "uvicorn", "open_clip"),
}
FIND = "import importlib.util, sys; print(*filter(importlib.util.find_spec, sys.argv[1:]))"
ASK = """
import sys, urllib.request, urllib.error
path, key, body = sys.argv[1:]
request = urllib.request.Request("http://127.0.0.1:8000" + path)
if key:
    request.add_header("Authorization", "Bearer " + key)
if body:
    request.data = open(body, "rb").read()
try:
    print(urllib.request.urlopen(request, timeout=60).read().decode())
except urllib.error.HTTPError as exc:
    print(exc.code)
"""


class Container:
    """An image's environment, and commands in it."""

    def __init__(self, image, scratch):
        self.image, self.scratch = image, scratch
        self.dockerfile = Dockerfile(image)
        self.place = scratch / image
        self.cache, self.work = scratch / "cache", scratch / "work"

    def make(self, device):
        """Install what the Dockerfile installs, by its own script and from its own context."""
        sources, wheels = self.scratch / "context", self.scratch / "wheels"
        for folder in (sources, wheels):
            shutil.rmtree(folder, ignore_errors=True)
        for path in context():
            (sources / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, sources / path)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        call(*pip, "wheel", "--no-deps", "--wheel-dir", wheels, sources)
        (wheel,) = wheels.glob("patchcache-*-linux_*.whl")  # with kernels
        words = [
            sources / "deploy/docker/install.py", "--extras", ",".join(self.dockerfile.extras()),
            "--device", device, "--project", sources / "pyproject.toml",
            "--constraints", sources / "deploy/constraints.txt", "--into", self.place,
        ]  # fmt: skip
        made_of = "\n".join(
            word.read_text() if isinstance(word, Path) and word.is_file() else str(word)
            for word in words
        )
        note = self.place / "made-of"
        if not note.exists() or note.read_text() != made_of:
            shutil.rmtree(self.place, ignore_errors=True)
            call(sys.executable, *words)
            note.write_text(made_of)
        python = self.place / "bin" / "python"
        call(*pip, "--python", python, "install", "--no-deps", "--force-reinstall", wheel)

    def environment(self):
        """What ENV of the Dockerfile sets, in the places that stand for the image's."""
        found = {
            name: value.replace("/cache", str(self.cache), 1) if value.startswith("/") else value
            for name, value in self.dockerfile.environment().items()
        }
        found["PATH"] = f"{self.place / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        return found

    def confined(self, *command):
        """The words that run a command as the image's user, with the image's environment."""
        return [
            "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs",
            "--inh-caps=-all", "--bounding-set=-all", "env", "--ignore-environment",
            *(f"{name}={value}" for name, value in self.environment().items()), *command,
        ]  # fmt: skip

    def words(self, *command):
        return [
            "unshare", "--mount", "--net", "sh", "-c", SETUP, "sh", self.cache, self.work,
            sys.base_prefix, closed_above(Path(sys.base_prefix)), *self.confined(*command),
        ]  # fmt: skip

    def run(self, *command):
        """Run a command; return what it prints."""
        return call(*self.words(*command))

    def enter(self, *arguments):
        """Run the image with arguments of its entry point."""
        print("$", self.image, *arguments, flush=True)
        return self.run(*self.dockerfile.words("ENTRYPOINT"), *arguments)

    @contextlib.contextmanager
    def started(self, *arguments):
        """Run the image in the background; gives its process."""
        print("$", self.image, *arguments, flush=True)
        words = self.words(*self.dockerfile.words("ENTRYPOINT"), *arguments)
        with subprocess.Popen(list(map(str, words))) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def beside(self, process, *command):
        """Run a command where a process of `started` runs."""
        return subprocess.run(
            ["nsenter", f"--target={process.pid}", "--mount", "--net", *self.confined(*command)],
            cwd=self.work,
            capture_output=True,
            text=True,
            check=False,
        )


def closed_above(path):
    """The outermost folder on the way to a path that others may not enter, or nothing."""
    return next((x for x in reversed(path.parents) if not x.stat().st_mode & 0o001), "")


def call(*words, cwd="/"):
    done = subprocess.run(
        list(map(str, words)), stdout=subprocess.PIPE, text=True, check=False, cwd=cwd
    )
    if done.returncode:
        sys.exit(f"`{' '.join(map(str, words[-12:]))}` ended with {done.returncode}\n{done.stdout}")
    return done.stdout


def check_builder(builder):
    print(builder.enter(*FIT))
    print(builder.enter(*BUILD, *HERE))
    print(builder.enter("verify", "cache"))
    builder.enter(*BUILD, "--workers", "1", "--out", "cache-of-ray")
    whole, of_ray = (
        {path.name: path.read_bytes() for path in (builder.work / name).rglob("*.tar")}
        for name in ("cache", "cache-of-ray")
    )
    assert whole
    assert whole == of_ray, "a build on Ray has other bytes"


def check_service(service):
    (service.work / "keys").write_text(f"{KEY} check\n")
    health = service.dockerfile.words("HEALTHCHECK")
    photo = min((service.work / "photos").rglob("*.jpg"))
    with service.started("--codebook", "photos.safetensors", "--key-file", "keys") as process:
        end = time.monotonic() + START_S
        while (last := service.beside(process, *health)).returncode:
            assert process.poll() is None, "the service has ended"
            assert time.monotonic() < end, f"not healthy:\n{last.stderr}"
            time.sleep(0.5)

        def ask(path, key="", body=""):
            return service.beside(process, "python", "-c", ASK, path, key, body).stdout.strip()

        answer = json.loads(ask("/v1/tokenize", KEY, photo))
        print("healthy;", {**answer, "token_ids": f"{len(answer['token_ids'])} ids"})
        assert len(answer["token_ids"]) == 16
        assert ask("/v1/tokenize", "", photo) == "401"
        assert "patchcache_ready 1.0" in ask("/metrics", KEY)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "SIGTERM"


def check_trainer(trainer):
    print(trainer.enter("train", "beit_drop", "--cache", "cache", "--out", "run",
        "--set", "run.steps=2", "--set", "data.batch_size=8", "--set", "model.embed_dim=32",
        "--set", "model.num_heads=2", "--set", "optim.warmup_steps=1",
        "--set", "run.checkpoint_every=2", "--set", "run.log_every=1"))  # fmt: skip
    print(trainer.enter("export", "run", "--out", "vit.safetensors"))
    assert (trainer.work / "vit.safetensors").stat().st_size


def check_image(image, scratch, device):
    container = Container(image, scratch)
    container.make(device)
    uid = container.run("python", "-c", "import os; print(os.getuid())")
    assert uid.split() == [str(USER)]
    found = container.run("python", "-c", FIND, *ABSENT[image]).split()
    assert not found, f"{image} holds {found}"
    {"builder": check_builder, "service": check_service, "trainer": check_trainer}[image](container)
    size = call("du", "-sm", container.place).split()[0]
    print(f"{image}: well; its environment has {int(size):,} MB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("image", nargs="*", default=list(IMAGES), help=" ".join(IMAGES))
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp/patchcache-images"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    if os.getuid():
        parser.error("it changes user and mounts file systems: run it as root")
    if unknown := set(arguments.image) - set(IMAGES):
        parser.error(f"there is no image {', '.join(unknown)}")
    scratch = arguments.scratch.absolute()
    work = scratch / "work"
    has_builder = "builder" in arguments.image
    if has_builder or not (work / "cache" / MANIFEST_NAME).exists():
        shutil.rmtree(work, ignore_errors=True)
        factories.write_folder(work / "photos", factories.photo_images(12))
        for words in () if has_builder else (FIT, (*BUILD, *HERE)):
            call(sys.executable, "-m", "cache_builder", *words, cwd=work)
    for folder in (scratch / "cache", work):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)
    for image in arguments.image:
        check_image(image, scratch, arguments.device)


if __name__ == "__main__":
    main()
