"""The command line speaks to a person, and to a pipe."""

import json
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch

from cache_builder import __version__, cli
from cache_builder.cli_errors import one_line_errors
from cache_builder.console import RECIPE_BATCH_SIZE, print_description
from tests import factories
from trainer.config import load_config

COMMANDS = (
    "fit", "build", "verify", "convert", "merge", "subset", "inspect", "serve", "tokenize", "train",
    "probe", "finetune", "export", "adopt", "doctor", "import", "export-codebook", "push", "pull",
)  # fmt: skip
CLI = [sys.executable, "-m", "cache_builder.cli"]


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
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", outcome.out)
    assert len(cli.app.registered_commands) == len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_shows_its_example(name, patchcache):
    outcome = patchcache(name, "--help")
    assert outcome.status == 0
    assert f"Example: patchcache {name} " in " ".join(outcome.out.split())


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
        (
            "inspect some.tar --max-images 1",
            "patchcache inspect: --max-images bounds a cache, or a",
        ),
        (
            "inspect some.tar --device cpu",
            "patchcache inspect: --device and --weights are of the mo",
        ),
        (
            "inspect some.tar --tokenizer 0",
            "patchcache inspect: --tokenizer chooses one of a cache's, and some.tar is no cache.",
        ),
        (
            "verify cache --tokenizer 0",
            "patchcache verify: --tokenizer 0 says which one tokenises again, and no image is to",
        ),
        (
            "verify cache --codebook codebook.safetensors",
            "patchcache verify: --codebook codebook.safetensors is a copy to repair with. Add --re",
        ),
        (
            "verify cache --images elsewhere",
            "patchcache verify: --images elsewhere is to repair or to tokenise again with, and di",
        ),
        (
            "verify cache --device cpu",
            "patchcache verify: --device cpu is to repair or to tokenise again with, and digests",
        ),
        ("verify .", "patchcache verify: . is not a cache: it has neither manifest.json nor"),
        (
            "build --images x --codebook nowhere --out cache",
            "patchcache build: There is no codebook at nowhere. Make one with `patchcache fit",
        ),
        (
            "build --images nowhere --codebook codebook.safetensors --out new",
            "patchcache build: nowhere is not there. Pass a folder of images, or tars, "
            "zips, Parquet files or a list.",
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
            "build --images images --codebook codebook.safetensors --out new --scale 0,1e400",
            "patchcache build: --scale takes 2 numbers with commas between, not '0,1e400'.",
        ),
        (
            "fit --images images --out c --sample 1__0",
            "patchcache fit: --sample takes a number of 1 or more, or all, not '1__0'.",
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
    assert outcome.out.endswith(f"damaged\nnext         patchcache verify {cache} --repair\n")
    outcome = patchcache("verify", cache, "--repair", "--device", "cpu")
    assert outcome.status == 0
    assert re.search(r"repaired +shards/000000.tar", outcome.out)
    assert outcome.out.endswith("whole\n")


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
    assert re.search(r"images +4 +1 skipped *\n", outcome.out)
    assert re.search(r"\na +2 ", outcome.out)
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
    # The one image is on a server that takes the question and never answers.
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(120)
    process = subprocess.Popen(
        [*CLI, "verify", cache, "--retokenize", "1",
         "--images", f"http://127.0.0.1:{server.getsockname()[1]}/images"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    connection, _ = server.accept()
    assert connection.recv(4) == b"GET "
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        connection.close()
        server.close()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped; the same command continues"
    assert "Traceback" not in err
    assert out == ""


def test_a_run_without_out_goes_to_a_folder_of_the_recipe_s_name(
    patchcache, cache, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(
        "[data]\nbatch_size = 4\n[optim]\nlr = 1e-3\n[run]\nsteps = 1\ndevice = 'cpu'\n"
        "[model]\nname = 'vit_tiny_patch16_224'\nembed_dim = 32\ndepth = 1\nnum_heads = 2\n"
    )
    status, out, _ = patchcache("train", "tiny.toml", "--cache", cache)
    assert status == 0
    assert "checkpoint   runs/tiny/checkpoints/step_00000001.pt" in out


@pytest.mark.parametrize("error", [MemoryError(), lambda: torch.empty(1 << 50)])
def test_too_little_memory_is_one_line(error, capsys):
    with pytest.raises(SystemExit, match="1"), one_line_errors():
        if callable(error):
            error()
        raise error
    line = capsys.readouterr().err
    assert line.startswith("patchcache: out of memory (")
    assert "Use fewer --workers" in line
    assert line.count("\n") == 1


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), one_line_errors():
        raise RuntimeError("a bug")


def test_a_library_that_is_missing_anywhere_is_named_with_the_extra_of_the_command(
    monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["patchcache", "-v", "train", "--cache", "cache"])
    with pytest.raises(SystemExit, match="1"), one_line_errors():
        raise ModuleNotFoundError("No module named 'timm'", name="timm")
    line = capsys.readouterr().err
    assert line.endswith("needs 'timm', which is not installed. Run: pip install "
                         "'patchcache[train]'\n")  # fmt: skip


def test_a_description_shows_brackets_as_they_are(capsys):
    print_description({"images": "/data/[red]/[/old]"})
    assert capsys.readouterr().out.split() == ["images", "/data/[red]/[/old]"]


def test_ctrl_c_before_a_command_has_begun_is_one_line(capsys):
    with pytest.raises(SystemExit, match="130"), one_line_errors():
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "stopped; the same command continues\n"


def test_what_a_build_says_to_run_next_suits_a_cache_of_few_images(patchcache, cache, tmp_path):
    images = str(tmp_path / "images")
    codebook = str(cache / "codebook.safetensors")
    outcome = patchcache(
        "build", "--images", images, "--codebook", codebook, "--out", str(tmp_path / "new"),
        "--workers", "0",
    )  # fmt: skip
    (line,) = (line for line in outcome.out.splitlines() if "patchcache train" in line)
    assignment = line.split("--set ")[1]
    recipe = load_config("beit_drop", [])
    assert recipe.data.batch_size == RECIPE_BATCH_SIZE
    assert load_config("beit_drop", [assignment]).data.batch_size == 4
