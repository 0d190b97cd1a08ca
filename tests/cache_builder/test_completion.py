"""A shell completes commands, options, and what patchcache knows by name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import plugins
from trainer.objectives import METHOD_NAMES

BIN = Path(sys.executable).parent


@pytest.fixture
def complete(patchcache, monkeypatch):
    """What a shell is told about the last of some words."""

    def ask(shell, *words):
        monkeypatch.setenv("_PATCHCACHE_COMPLETE", f"complete_{shell}")
        if shell == "bash":
            monkeypatch.setenv("COMP_WORDS", " ".join(["patchcache", *words]))
            monkeypatch.setenv("COMP_CWORD", str(len(words)))
        else:
            monkeypatch.setenv("_TYPER_COMPLETE_ARGS", " ".join(["patchcache", *words]))
            monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        outcome = patchcache()
        monkeypatch.delenv("_PATCHCACHE_COMPLETE")
        return outcome.out

    return ask


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_completes_commands_options_and_methods(complete, shell):
    assert {"train", "build", "doctor"} & set(complete(shell, "tr").replace('"', " ").split()) == {
        "train"
    }
    assert "--codebook" in complete(shell, "build", "--code")
    found = complete(shell, "train", "--method", "m")
    assert set(re.findall(r"\w+", found)) & set(METHOD_NAMES) == {"mapet", "mcbeit"}


def test_recipes_methods_layouts_and_tokenizers_are_completed(complete, tmp_path):
    assert complete("bash", "train", "beit").split() == ["beit", "beit_drop", "beitv2"]
    assert set(complete("bash", "train", "--method", "").split()) == set(METHOD_NAMES)
    assert complete("bash", "build", "--layout", "w").split() == ["webdataset"]
    with plugins.on_path(plugins.offer(tmp_path, "", vqkd="load", dvae="load")):
        assert complete("bash", "adopt", "").split() == ["dvae", "vqkd"]
        assert complete("bash", "adopt", "v").split() == ["vqkd"]


@pytest.mark.parametrize(
    ("shell", "place"),
    [
        ("bash", ".bash_completions/patchcache.sh"),
        ("zsh", ".zfunc/_patchcache"),
        ("fish", ".config/fish/completions/patchcache.fish"),
    ],
)
def test_completion_is_installed_and_shown(patchcache, monkeypatch, tmp_path, shell, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = patchcache("--show-completion", shell)
    assert shown.status == 0, shown.err
    assert patchcache("--install-completion", shell).status == 0
    assert (tmp_path / place).read_text().strip() == shown.out.strip()


def test_bash_itself_completes_with_the_installed_script(patchcache, monkeypatch):
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = patchcache("--show-completion", "bash").out
    asking = """
        COMP_WORDS=(patchcache train bey); COMP_CWORD=2
        $(complete -p patchcache | sed 's/.*-F \\([^ ]*\\) .*/\\1/') patchcache
        echo "${COMPREPLY[@]}"
    """
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script + asking], env=environment, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["beyond"], done.stderr
