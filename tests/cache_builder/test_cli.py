"""The command line speaks to a person, and to a pipe; its examples run."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import timm
from safetensors.torch import load_file

from cache_builder import __version__, cli
from cache_builder.formats import TokenCache
from tests import factories

COMMANDS = {command.callback.__name__: command.callback for command in cli.app.registered_commands}
CLI = [sys.executable, "-m", "cache_builder.cli"]
ON_RAY = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def example_of(name):
    """Return the words of the example in a command's help."""
    text = COMMANDS[name].__doc__.strip()
    assert re.search(r"\n *\n *Example: `patchcache ([^`]+)`$", text), text
    return shlex.split(text.rpartition("`patchcache ")[2].removesuffix("`"))


@pytest.fixture
def cache(tmp_path, codebook_path):
    images = factories.write_folder(
        tmp_path / "images", factories.photo_images(4) | {"a/bad.jpg": b"text"}
    )
    factories.build_cache(images=str(images), codebook=codebook_path, out=tmp_path / "cache")
    return tmp_path / "cache"


def test_help_lists_every_command(patchcache):
    outcome = patchcache("--help")
    assert outcome.status == 0
    assert outcome.err == ""
    for name in ("fit", "build", "verify", "inspect", "serve", "train", "probe", "export"):
        assert re.search(rf"\b{name}\b", outcome.out)
    assert set(COMMANDS) == {
        "fit", "build", "verify", "inspect", "serve", "train", "probe", "export",
    }  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_ends_in_an_example_of_it(name, patchcache):
    assert example_of(name)[0] == name
    outcome = patchcache(name, "--help")
    assert outcome.status == 0
    assert "Example: patchcache " + name in " ".join(outcome.out.split())


def test_the_version_is_printed(patchcache):
    assert patchcache("--version") == (0, f"patchcache {__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [
        ["fit"],
        ["build", "--images", "x"],
        ["fit", "--images", "x", "--out", "y", "-k", "many"],
        ["build", "--no-such-option"],
        ["no-such-command"],
        ["fit", "--images", "x", "--out", "y", "-k", "0"],
        ["build", "--images", "x", "--codebook", "c", "--out", "y", "--layout", "lmdb"],
    ],
)
def test_wrong_usage_exits_with_2(patchcache, words):
    outcome = patchcache(*words)
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("Usage: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("inspect nowhere", "patchcache inspect: There is nothing at nowhere."),
        ("verify .", "patchcache verify: . is not a cache: it has neither manifest.json nor"),
        (
            "build --images x --codebook nowhere --out cache",
            "patchcache build: There is no codebook at nowhere. Make one with `patchcache fit",
        ),
        (
            "build --images nowhere --codebook codebook.safetensors --out new",
            "patchcache build: nowhere is not there. Pass a folder of images, or tars.",
        ),
        (
            "build --images images --codebook codebook.safetensors --out new --scale 1",
            "patchcache build: --scale takes 2 numbers with commas between, not '1'.",
        ),
        (
            "build --images images --codebook codebook.safetensors --out new --ratio 2,1/0",
            "patchcache build: --ratio takes 2 numbers with commas between, not '2,1/0'.",
        ),
        (
            "build --images images --codebook codebook.safetensors --out cache --seed 5",
            "patchcache build: cache holds a build with other settings: view_spec.seed: 0 there, 5",
        ),
        (
            "build --images images --codebook codebook.safetensors --out images",
            "patchcache build: images is not empty and holds no plan.json.",
        ),
        (
            "fit --images images --out c --features timm:resnet10t --weights random",
            "patchcache fit: --weights random needs an explicit --seed.",
        ),
        ("fit --images images --out c --mean 1,2", "patchcache fit: --mean takes 3 numbers"),
        (
            "fit --images images --out c --features-arg depth",
            "patchcache fit: --features-arg takes NAME=VALUE, not 'depth'.",
        ),
        (
            "build --images images --codebook codebook.safetensors --out codebook.safetensors/x",
            "codebook.safetensors",
        ),
        (
            "serve --codebook nowhere",
            "patchcache serve: There is no codebook at nowhere.",
        ),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exits_with_1(
    patchcache, cache, monkeypatch, words, message
):
    monkeypatch.chdir(cache.parent)
    outcome = patchcache(*words.split())
    assert outcome.status == 1
    assert outcome.out == ""
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_missing_library_says_what_to_install(patchcache, cache, monkeypatch):
    monkeypatch.chdir(cache.parent)
    monkeypatch.setitem(sys.modules, "ray", None)
    words = "build --images images --codebook codebook.safetensors --out new"
    outcome = patchcache(*words.split())
    assert outcome.status == 1
    assert outcome.err == (
        "patchcache build: This command needs 'ray', which is not installed. "
        "Run: pip install 'patchcache[build]'\n"
    )


def test_verify_prints_its_result_and_exits_with_1_on_damage(patchcache, cache):
    outcome = patchcache("verify", cache, "--retokenize", 3)
    assert outcome.status == 0
    assert outcome.err == ""
    assert re.search(r"samples +4, and 1 skipped", outcome.out)
    assert re.search(r"retokenised +3 images, 48 token ids: 0 different", outcome.out)
    assert outcome.out.endswith("whole\n")
    factories.flip_byte(cache / "shards/000000.tar")
    outcome = patchcache("verify", cache)
    assert outcome.status == 1
    assert re.search(r"damage +unit 0: .*000000.tar has SHA-256", outcome.out)
    assert outcome.out.endswith("damaged\n")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["verify", "--retokenize", "2"], {"problems": [], "num_samples": 4, "num_skipped": 1}),
        (["inspect"], {"kind": "cache", "num_samples": 4, "grid": [4, 4], "vocab_size": 6}),
    ],
)
def test_json_is_for_scripts(patchcache, cache, command, expected):
    outcome = patchcache(*command, cache, "--json")
    assert outcome.status == 0
    assert json.loads(outcome.out).items() >= expected.items()


def test_inspect_draws_a_table(patchcache, cache, codebook_path):
    outcome = patchcache("inspect", cache)
    assert re.search(r"num_samples +4 *\n", outcome.out)
    assert re.search(r"labels.a +2 *\n", outcome.out)
    assert re.search(r"vocab_size +6 *\n", patchcache("inspect", codebook_path).out)
    assert re.search(
        r"first.key +a/000 *\n", patchcache("inspect", cache / "shards/000000.tar").out
    )


def test_an_interrupt_is_one_line_and_exits_with_130(tmp_path, codebook_path):
    images = factories.write_folder(tmp_path / "images", factories.photo_images(1))
    cache = tmp_path / "cache"
    factories.build_cache(
        images=str(images), codebook=codebook_path, out=cache, images_in_cache="none"
    )
    # The one image becomes a file that never gives its content.
    waits = images / "a/000.jpg"
    waits.unlink()
    os.mkfifo(waits)
    process = subprocess.Popen(
        [*CLI, "verify", cache, "--retokenize", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    writer = None
    while writer is None:
        assert process.poll() is None, process.stderr.read()
        try:
            writer = os.open(waits, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    os.close(writer)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped; the same command continues"
    assert "Traceback" not in err
    assert out == ""


class TestExamples:
    """The examples of the help, in the order in which a user meets them, made small."""

    pytestmark = ON_RAY

    SMALL = {  # noqa: RUF012
        "fit": "-k 16 --image-size 32 --patch-size 8 --workers 1",
        "build": "--views 2 --workers 1",
        "train": "--set run.steps=4 --set optim.warmup_steps=1 --set data.batch_size=8 "
        "--set model.embed_dim=32 --set model.depth=1 --set model.num_heads=2",
        "serve": "--port 0 --device cpu",
    }

    @pytest.fixture
    def run(self, tmp_path, monkeypatch, patchcache):
        factories.write_folder(tmp_path / "photos", factories.photo_images(60))
        monkeypatch.chdir(tmp_path)

        def run(name):
            words = [*example_of(name), *shlex.split(self.SMALL.get(name, ""))]
            outcome = patchcache(*words)
            assert outcome.status == 0, outcome.err
            return outcome.out

        return run

    def test_they_run(self, run, tmp_path):
        assert re.search(r"centroids +16 of 192 values", run("fit"))
        assert re.search(r"images +60, 2 views each, 4 x 4 token ids", run("build"))
        assert run("verify").endswith("whole\n")
        assert "num_samples" in run("inspect")
        run("train")
        # The example trains for 1,000 steps.
        checkpoints = tmp_path / "run" / "checkpoints"
        shutil.copy(checkpoints / "step_00000004.pt", checkpoints / "step_00001000.pt")
        assert re.search(r"k-NN|knn", run("probe"), re.IGNORECASE)
        printed = run("export")
        self.check_export(tmp_path / "vit.safetensors", printed)
        self.check_service(tmp_path)

    def check_export(self, path, printed):
        call = printed.rpartition("load     ")[2].strip()
        model = eval(call, {"timm": timm})
        model.load_state_dict(load_file(path), strict=True)

    def check_service(self, folder):
        words = [*example_of("serve"), *shlex.split(self.SMALL["serve"])]
        process = subprocess.Popen([*CLI, *words], cwd=folder, stderr=subprocess.PIPE, text=True)
        with process:
            try:
                lines = iter(process.stderr.readline, "")
                url = next(m[0] for line in lines if (m := re.search(r"http://[\d.]+:\d+", line)))
                reader = threading.Thread(target=process.stderr.read)
                reader.start()
                image = (folder / "photos/a/000.jpg").read_bytes()
                with httpx.Client(trust_env=False, timeout=30) as client:
                    answer = client.post(f"{url}/v1/tokenize", content=image)
                assert answer.status_code == 200
                with TokenCache.open(folder / "cache") as cache:
                    expected = cache[0].token_ids[0].flatten().tolist()
                assert answer.json()["token_ids"] == expected
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
                reader.join()


class TestRealImages:
    """The route on the photographs and on CIFAR-10, where they are at hand."""

    pytestmark = ON_RAY

    def route(self, patchcache, images, folder, fit, build):
        codebook, cache = folder / "codebook.safetensors", folder / "cache"
        for words in (
            ["fit", "--images", images, "--out", codebook, *fit.split()],
            ["build", "--images", images, "--codebook", codebook, "--out", cache, *build.split()],
        ):
            outcome = patchcache(*words, "--json")
            assert outcome.status == 0, outcome.err
        verified = patchcache("verify", cache, "--retokenize", 40, "--json")
        assert verified.status == 0, verified.out
        return codebook, cache, json.loads(outcome.out), json.loads(verified.out)

    def test_photographs_at_224_with_512_centroids_and_4_views(self, patchcache, photos, tmp_path):
        codebook, _, built, verified = self.route(
            patchcache, photos, tmp_path, "-k 512 --sample 20000 --iterations 4", "--views 4"
        )
        assert (built["num_samples"], built["num_views"], built["num_skipped"]) == (250, 1000, 0)
        assert verified["retokenized"] == {
            "num_images": 40, "num_tokens": 40 * 4 * 196, "num_near_ties": 0, "num_different": 0,
        }  # fmt: skip
        described = json.loads(patchcache("inspect", codebook, "--json").out)
        assert described["quality"]["perplexity"] > 200
        assert described["quality"]["held_out_psnr_db"] > 17

    def test_cifar_in_patches_of_4(self, patchcache, cifar_tar, tmp_path):
        images = tmp_path / "images"
        num_taken = Counter()
        with tarfile.open(cifar_tar) as tar:
            for member in tar:
                parts = Path(member.name).parts
                if member.isfile() and parts[1] == "train" and num_taken[parts[2]] < 30:
                    num_taken[parts[2]] += 1
                    name = f"{parts[2]}/{parts[3]}"
                    factories.write_folder(images, {name: tar.extractfile(member).read()})
                if num_taken.total() == 300:
                    break
        _, cache, built, verified = self.route(
            patchcache, images, tmp_path, "-k 64 --image-size 32 --patch-size 4 --workers 1",
            "--views 2 --layout zarr --unit-size 100 --workers 1",
        )  # fmt: skip
        assert (built["num_samples"], built["num_shards"]) == (300, 3)
        assert verified["problems"] == []
        described = json.loads(patchcache("inspect", cache, "--json").out)
        assert described["grid"] == [8, 8]
        assert described["labels"].keys() >= {"airplane", "truck"}
        assert set(described["labels"].values()) == {30}
