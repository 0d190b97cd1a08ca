"""The examples that the commands' help ends in, run one after the other as a user would."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from cache_builder.cli import app
from tests import factories
from tests.conftest import Outcome

BIN = Path(sys.executable).parent
SMALLER = {
    "fit": ["-k", "8", "--image-size", "32", "--patch-size", "8", "--iterations", "5"],
    "build": ["--views", "2"],
    "train": [
        "--set", "run.steps=4", "--set", "data.batch_size=8", "--set", "model.embed_dim=32",
        "--set", "model.num_heads=2", "--set", "optim.warmup_steps=1",
        "--set", "run.checkpoint_every=2", "--set", "run.log_every=1",
    ],
    "finetune": ["--set", "data.batch_size=8", "--set", "run.epochs=2"],
}  # fmt: skip


def examples():
    """Return every command's example as words, by command name."""
    found = {}
    for command in app.registered_commands:
        text = " ".join((command.callback.__doc__ or "").split())
        match = re.search(r"Example: `patchcache ([^`]+)`$", text)
        found[command.callback.__name__] = shlex.split(match[1]) if match else None
    return found


def test_the_help_of_every_command_ends_in_an_example():
    assert [name for name, words in examples().items() if words is None] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the examples assume it: drawn photographs of two classes in photos/."""
    root = tmp_path_factory.mktemp("examples")
    factories.write_folder(root / "photos", factories.photo_images(60))
    return root


def run(folder, words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [BIN / "patchcache", *words], cwd=folder, env=environment, capture_output=True, text=True,
        check=False, timeout=240,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.ray
@pytest.mark.slow
def test_the_examples_lead_from_a_folder_of_photos_to_a_served_and_exported_model(
    folder, patchcache, monkeypatch
):
    monkeypatch.chdir(folder)
    for name in ("fit", "build", "verify", "inspect", "train", "probe", "finetune", "export"):
        words = [_on_this_run(word) for word in examples()[name]] + SMALLER.get(name, [])
        # Those that start a cluster do it as processes; the others run here, where torch is loaded.
        done = run(folder, words) if name in ("fit", "build") else patchcache(*words)
        assert done.status == 0, (name, done.err)
        assert done.out.strip(), name
        assert "Traceback" not in done.err
    assert (folder / "vit.safetensors").stat().st_size > 10_000
    with _served(folder, examples()["serve"]) as url:
        photo = min((folder / "photos").rglob("*.jpg"))
        request = urllib.request.Request(f"{url}/v1/tokenize", data=photo.read_bytes())
        with urllib.request.urlopen(request, timeout=30) as reply:
            answer = json.load(reply)
        words = [url if word.startswith("http:") else word for word in examples()["tokenize"]]
        done = run(folder, words)
        assert done.status == 0, done.err
    with np.load(folder / "tokens.npz") as tokens:
        assert tokens["token_ids"].shape == (60, 4, 4)
    assert answer["shape"] == [4, 4]
    cached = json.loads(patchcache("inspect", "cache/", "--json").out)
    assert answer["fingerprint"] == cached["fingerprint"]


def _on_this_run(word):
    # The examples name a checkpoint of a longer run.
    return word.replace("step_00001000.pt", "step_00000004.pt")


@contextlib.contextmanager
def _served(folder, words):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(port) if word == "8000" else word for word in words]
    service = subprocess.Popen([BIN / "patchcache", *words], cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert service.poll() is None
            assert time.monotonic() < deadline
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
                break
            time.sleep(0.1)
        yield url
    finally:
        service.terminate()
        assert service.wait(timeout=30) == 0
