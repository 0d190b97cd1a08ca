"""Every fenced block of the documents is run, or checked, or has a reason why not.

Python is run in `test_python.py`, and the commands that can be in `test_shell.py`; `programs.py`
has the reasons of the others. Here all are parsed by the command line itself: their names,
options, values and arguments are right. The examples of every command are run in
`tests/test_examples.py`.
"""

import json
import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from cache_builder.cli import app
from tests.documents.blocks import SHELL, Block, blocks_of, commands_of
from tests.documents.pages import PAGES
from tests.documents.programs import OTHERS
from tests.places import ROOT

DATA = {
    "toml": tomllib.loads,
    "yaml": lambda text: all(yaml.safe_load_all(text)),
    "json": json.loads,
}
# Not run and not parsed.
NO_CODE = {
    "text": "what a command prints, a drawing or a formula",
}
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
CLI = typer.main.get_command(app)


def of(*languages):
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.where)


def test_every_block_says_what_it_is():
    known = {*SHELL, *NO_CODE, *DATA, "python"}
    assert [block.where for block in BLOCKS if block.language not in known] == []


@of(*DATA)
def test_data_can_be_read(block):
    assert DATA[block.language](block.text)


@of(*SHELL)
def test_commands_are_such_as_there_are(block):
    commands = commands_of(block)
    assert commands
    for words in commands:
        check(words)


def check(words):
    """Fail unless a command is one that its program would take."""
    program, *rest = words
    program = program.rpartition("/")[2]
    if "--" in rest and program in OTHERS:  # ray job submit ... -- patchcache ...
        check(rest[rest.index("--") + 1 :])
    elif program == "docker" and any(word.startswith("patchcache-") for word in rest[:-1]):
        check_docker(rest)
    elif program == "patchcache":
        parse(rest)
    elif program == "torchrun":
        parse(rest[rest.index("cache_builder") + 1 :])
    elif program == "train.sh":
        parse(["train", *rest[2:]])
    elif program == "sbatch":
        script = next(word for word in rest if word.endswith(".sbatch"))
        assert (ROOT / script).is_file()
        parse([Path(script).stem, *rest[rest.index(script) + 1 :]])
    elif program in {"python", "python3"}:
        check_python(rest)
    elif program == "make":
        check_make(rest)
    elif program == "pip":
        check_pip(rest)
    elif program == "curl":
        check_curl(rest)
    else:
        assert program in OTHERS, words


def parse(words):
    """Parse a command of ours and run nothing."""
    words = [word for word in words if word != "..."]  # ... what follows is left out
    if words and not words[0].startswith("-"):
        name, *rest = words
        assert name in CLI.commands, name
        root = CLI.make_context("patchcache", [name], resilient_parsing=True)
        CLI.commands[name].make_context(name, rest, parent=root)
    else:
        CLI.make_context("patchcache", words, resilient_parsing=True)


def check_docker(words):
    """Parse what an image of ours is to run."""
    image = next(index for index, word in enumerate(words) if word.startswith("patchcache-"))
    if words[0] == "run":
        program = [words[words.index("--entrypoint") + 1]] if "--entrypoint" in words else []
        check([*(program or ["patchcache"]), *words[image + 1 :]])


def check_python(words):
    if words[0] == "-m":
        if words[1] == "cache_builder":
            parse(words[2:])
            return
        if words[1] in {"venv", "pip", "http.server"}:
            return
        path = ROOT.joinpath(*words[1].split("."))
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        words = words[1:]
    elif words[0] == "-c":
        compile(words[1], "-c", "exec")
        return
    else:
        path = ROOT / words[0]
    assert path.is_file(), words
    text = path.read_text()
    for option in (word for word in words[1:] if word.startswith("--")):
        assert f'"{option}"' in text, (option, path)


def check_make(words):
    targets = set(re.findall(r"^([a-z.$()A-Z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        assert "=" in word or word in targets or word == ".venv", word


def check_pip(words):
    assert words[0] == "install", words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for word in words[1:]:
        found = re.fullmatch(r"(?:patchcache|\.|.*\.whl)\[([\w,-]+)\]", word)
        assert {*(found[1].split(",") if found else ())} <= extras.keys(), word


def check_curl(words):
    served = json.loads((ROOT / "tests" / "tokenizers_svc" / "openapi.json").read_text())["paths"]
    patterns = [re.escape(path).replace(r"\{", "{").replace(r"\}", "}") for path in served]
    patterns = [re.sub(r"\{\w+\}", "[^/]+", pattern) for pattern in patterns]
    paths = [re.sub(r"^http://[^/]+|\?.*$", "", word) for word in words if word.startswith("http")]
    assert paths, words
    for path in paths:
        assert path in {"/", "/metrics"} or any(re.fullmatch(p, path) for p in patterns), path


@pytest.mark.parametrize(
    "text",
    [
        "patchcache fitt --images photos/ --out a.safetensors",
        "patchcache fit --image photos/ --out a.safetensors",
        "patchcache fit --images photos/ -k many --out a.safetensors",
        "patchcache fit --images photos/",
        "patchcache build --layout tar --out cache/",
        "patchcache verify cache/ more/",
        "ray job submit --address http://HEAD:8265 -- patchcache build --worker 8 --out cache/",
        "torchrun --nproc-per-node gpu -m cache_builder train beit --cachee cache/",
        "python tests/benchmarks/bench_no.py",
        "python tests/benchmarks/bench_train.py --divice cuda",
        "docker run --rm patchcache-builder:0.1.0 biuld --images photos/",
        "make tests",
        "pip install 'patchcache[biuld]'",
        "curl http://127.0.0.1:8000/v1/tokenise",
        "sbatch deploy/slurm/train.sbatch beit --cachee cache/",
        "sbatch deploy/slurm/no.sbatch",
        "deploy/torchrun/train.sh host:29400 2 beit --cachee cache/",
        "rm -rf cache/",
    ],
)
def test_a_command_that_there_is_not_is_found(text):
    (words,) = commands_of(Block(ROOT / "x.md", 1, "bash", text + "\n"))
    with pytest.raises(Exception, match=r".*"):
        check(words)


def test_the_commands_of_a_session_are_what_follows_its_prompt():
    text = (
        "# a comment\n$ A=1 make demo \\\n      DATA=x  # why\n22 photographs\n$ a 2> d | b > c\n"
    )
    block = Block(ROOT / "x.md", 1, "console", text)
    assert commands_of(block) == [["make", "demo", "DATA=x"], ["a"], ["b"]]
