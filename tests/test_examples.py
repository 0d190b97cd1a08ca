"""The examples that the commands' help ends in, run one after the other as a user would."""

import json
import os
import re
import shlex
import subprocess
import urllib.request

import numpy as np
import pytest

from cache_builder.cli import app
from tests import factories
from tests.conftest import Outcome
from tests.small_commands import BIN, SMALLER, served


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
    with served(folder, examples()["serve"]) as url:
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
