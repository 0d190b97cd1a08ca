"""Who may import whom, and at what cost. The import-linter contracts say the same statically."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

HEAVY = {"torch", "ray", "faiss", "open_clip", "fastapi", "uvicorn", "webdataset", "zarr", "timm"}
BIN = Path(sys.executable).parent
FOLDERS = ("cache_builder", "tokenizers_svc", "trainer", "deploy", "tests")
MOST_LINES = 400


def modules():
    """Return the texts of all modules by their paths."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in found}


def modules_after(statement):
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import cache_builder.cli", HEAVY | {"numpy"}),
        ("import cache_builder.formats", HEAVY),
        ("import cache_builder.sources", HEAVY - {"torch"}),
        ("import cache_builder.transform", HEAVY),
        ("import tokenizers_svc.client", HEAVY | {"starlette"}),
        ("import tokenizers_svc.ray_serve", {"ray", "faiss", "trainer", "webdataset", "zarr"}),
    ],
)
def test_import_stays_light(statement, banned):
    assert not modules_after(statement) & banned


def cpu_seconds(*command):
    """Return the least CPU time of several runs: other processes share the machine."""

    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(4))


def test_help_answers_within_a_third_of_a_second():
    seconds = cpu_seconds(BIN / "patchcache", "--help")
    # A slow machine is one where the libraries of the command line alone take long.
    if seconds >= 0.3:
        libraries = cpu_seconds(sys.executable, "-c", "import typer.main, typer.rich_utils")
        assert seconds < 2 * libraries


def test_the_import_contracts_hold():
    done = subprocess.run([BIN / "lint-imports"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_module_is_small_enough_to_read():
    lengths = {name: len(text.splitlines()) for name, text in modules().items()}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def test_every_module_says_what_it_decides():
    without = [name for name, text in modules().items() if not re.match(r'(#.*\n)*r?"""', text)]
    assert without == []


@pytest.mark.cluster
def test_tests_that_start_clusters_share_a_process(request):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("tests run in one process, not in those of `make test`")
    assert request.node.nodeid.endswith("@clusters")
