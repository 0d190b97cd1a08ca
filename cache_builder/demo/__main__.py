"""`make demo`: fit, build, verify, train, probe, serve and report, on real images.

Without arguments it uses what installed libraries bundle: photographs, whose token maps are shown,
and 1,797 labelled handwritten digits, which a small ViT is trained on. With `--data` everything is
done on a folder of one's own. Each step is a command that is printed before it runs.
"""

import argparse
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from cache_builder.demo import images, report
from cache_builder.errors import ConfigError, PatchCacheError

logger = logging.getLogger(__name__)

_MARKER = ".patchcache-demo"
_MAX_OWN_IMAGES = 2000
_SERVICE_START_S = 60


class Route(NamedTuple):
    """One set of images on its way to a cache, and how it is cut."""

    name: str
    title: str
    folder: Path
    image_size: int
    patch_size: int
    k: int
    views: int
    layout: str
    build_options: tuple[str, ...] = ()


class Demo:
    """Runs commands in one folder and remembers them."""

    def __init__(self, out: Path) -> None:
        """Take a folder, which is emptied if an earlier demo made it.

        Raises:
            ConfigError: It holds something else.
        """
        if out.exists() and any(out.iterdir()):
            if not (out / _MARKER).is_file():
                raise ConfigError(f"{out} holds other files. Choose another --out.")
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARKER).touch()
        self.out = out
        self.commands: list[str] = []

    def patchcache(self, *words: object) -> None:
        """Run a command for the user to see.

        Raises:
            ConfigError: It failed.
        """
        done = subprocess.run(self._note(words), check=False)
        if done.returncode:
            raise ConfigError(f"the command above failed with exit code {done.returncode}.")

    def patchcache_json(self, *words: object) -> tuple[dict[str, Any] | None, str]:
        """Run a command and return its JSON result, or None and what it complained of."""
        argv = [*self._note(words), "--json"]
        done = subprocess.run(argv, check=False, capture_output=True)
        if done.returncode:
            return None, done.stderr.decode().strip().splitlines()[-1]
        return json.loads(done.stdout), ""

    def _note(self, words: tuple[object, ...]) -> list[str]:
        texts = [str(word) for word in words]
        self.commands.append(shlex.join(["patchcache", *texts]))
        print(f"\n$ {self.commands[-1]}", flush=True)
        return [sys.executable, "-m", "cache_builder.cli", *texts]

    def make_cache(self, route: Route) -> report.Route:
        """Fit, build and verify; return what was made."""
        codebook = self.out / f"{route.name}.codebook.safetensors"
        cache = self.out / f"{route.name}.cache"
        self.patchcache(
            "fit", "--images", route.folder, "-k", route.k, "--image-size", route.image_size,
            "--patch-size", route.patch_size, "--out", codebook,
        )  # fmt: skip
        self.patchcache(
            "build", "--images", route.folder, "--codebook", codebook, "--views", route.views,
            "--layout", route.layout, *route.build_options, "--out", cache,
        )  # fmt: skip
        self.patchcache("verify", cache, "--retokenize", 20)
        return report.Route(route.title, codebook, cache)

    def serve_one(self, codebook: Path, picture: Path) -> tuple[str, dict[str, Any]]:
        """Start the service, send it one picture over a socket, stop it."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        argv = self._note(("serve", "--codebook", codebook, "--port", port))
        service = subprocess.Popen(argv)
        try:
            _wait_until_ready(url, service)
            curl = f"curl --data-binary @{shlex.quote(str(picture))} {url}/v1/tokenize"
            print(f"\n$ {curl}", flush=True)
            request = urllib.request.Request(
                f"{url}/v1/tokenize",
                data=picture.read_bytes(),
                headers={"Content-Type": "application/octet-stream"},
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                answer: dict[str, Any] = json.load(reply)
        finally:
            service.send_signal(signal.SIGINT)
            service.wait(timeout=30)
        shown = {**answer, "token_ids": f"[{len(answer['token_ids'])} ids]"}
        print(json.dumps(shown))
        return curl, answer


def run(out: Path, data: Path | None) -> None:
    """Run the demo in `out`."""
    started_s = time.monotonic()
    demo = Demo(out)
    routes, overrides = _bundled(demo) if data is None else _own(demo, data)
    made = [demo.make_cache(route) for route in routes]
    run_dir = out / "run"
    settings = [word for override in overrides for word in ("--set", override)]
    demo.patchcache("train", "beit_drop", "--cache", made[-1].cache, "--out", run_dir, *settings)
    probed, note = demo.patchcache_json("probe", run_dir)
    if probed is None:
        print(note)
    else:
        note = (
            f"{probed['num_train']:,} images to learn from, {probed['num_test']:,} to test on, "
            f"{probed['num_classes']} classes; always naming the commonest is right for "
            f"{probed['chance']:.1%}."
        )
        for name, key in (("k-NN", "knn"), ("linear probe", "linear")):
            print(f"{name:13s} random {probed[key + '_random']:.1%}, pre-trained {probed[key]:.1%}")
    demo.patchcache("export", run_dir, "--out", out / "vit.safetensors")
    picture = min(path for path in routes[0].folder.rglob("*") if path.is_file())
    curl, answer = demo.serve_one(made[0].codebook, picture)
    page = out / "report.html"
    elapsed_s = time.monotonic() - started_s
    report.write(
        page,
        report.Material(
            routes=made,
            log=run_dir / "log.jsonl",
            probe=probed,
            probe_note=note,
            curl=curl,
            answer=answer,
            commands=demo.commands,
            elapsed_s=elapsed_s,
        ),
    )
    _say_what_was_made(out, page, data, elapsed_s)


def _bundled(demo: Demo) -> tuple[list[Route], list[str]]:
    photos, digits = demo.out / "photos", demo.out / "digits"
    num_photos = images.collect_photos(photos)
    num_digits = images.collect_digits(digits)
    print(f"{num_photos} photographs in {photos}, {num_digits:,} handwritten digits in {digits}")
    crops = ("--hflip", "0", "--scale", "0.5,1")  # a mirrored digit is another sign
    routes = [
        Route("photos", "Photographs", photos, 224, 8, 256, 4, "webdataset"),
        Route("digits", "Handwritten digits", digits, 16, 4, 256, 4, "zarr", crops),
    ]
    return routes, [
        "run.steps=800",
        "run.log_every=40",
        "run.picture_every=200",
        "data.batch_size=64",
        "data.color_jitter=0",
        "objective.mask_ratio=0.5",
        "optim.warmup_steps=20",
    ]


def _own(demo: Demo, data: Path) -> tuple[list[Route], list[str]]:
    folder = demo.out / "images"
    num_images = images.link_sample(data, folder, _MAX_OWN_IMAGES)
    print(f"{num_images:,} images of {data}, linked in {folder}")
    size, patch_size = (32, 4) if images.are_small(folder) else (224, 16)
    num_patches = num_images * (size // patch_size) ** 2
    k = max(8, min(512, 1 << (num_patches // 64).bit_length() - 1))
    batch_size = min(64, num_images)
    route = Route("own", f"Images of {data}", folder, size, patch_size, k, 4, "webdataset")
    num_steps = 400 if size == 32 else 100  # two minutes or so on two cores
    return [route], [
        f"run.steps={num_steps}",
        "run.log_every=20",
        f"run.picture_every={num_steps}",
        f"data.batch_size={batch_size}",
        "optim.warmup_steps=20",
    ]


def _wait_until_ready(url: str, service: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _SERVICE_START_S
    while time.monotonic() < deadline_s:
        if service.poll() is not None:
            raise ConfigError(f"the service ended with exit code {service.returncode}.")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise ConfigError(f"the service was not ready after {_SERVICE_START_S} s.")


def _say_what_was_made(out: Path, page: Path, data: Path | None, elapsed_s: float) -> None:
    own = data or "/path/to/folder"
    print(
        f"\nDone in {elapsed_s:.0f} s. Look at {page}\n\n"
        f"  {out}/*.codebook.safetensors   codebooks\n"
        f"  {out}/*.cache                  caches: patchcache inspect {out}/*.cache\n"
        f"  {out}/run                      checkpoints and logs\n"
        f"  {out}/vit.safetensors          the pre-trained ViT, for timm\n\n"
        "The same with images of your own:\n\n"
        + ("  make demo DATA=/path/to/folder\n\nor step by step:\n\n" if data is None else "")
        + f"  source .venv/bin/activate\n"
        f"  patchcache fit --images {own} -k 8192 --out codebook.safetensors\n"
        f"  patchcache build --images {own} --codebook codebook.safetensors --views 4 --out cache\n"
        f"  patchcache verify cache --retokenize 100\n"
        f"  patchcache train beit_drop --cache cache --out run\n"
        f"  patchcache probe run\n"
        f"  patchcache serve --codebook codebook.safetensors"
    )


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m cache_builder.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for what is made")
    parser.add_argument("--data", type=Path, help="a folder of images of your own")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        run(args.out, args.data)
    except PatchCacheError as exc:
        print(f"demo: {exc}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
