"""Who may import whom, and at what cost. The import-linter contracts say the same statically."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = {"torch", "ray", "faiss", "open_clip", "fastapi", "uvicorn", "webdataset", "zarr", "timm"}
BIN = Path(sys.executable).parent


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
        ("import tokenizers_svc.app", {"ray", "faiss", "trainer", "webdataset", "zarr"}),
    ],
)
def test_import_stays_light(statement, banned):
    assert not modules_after(statement) & banned


def test_help_answers_within_a_third_of_a_second():
    def seconds():
        started = time.perf_counter()
        subprocess.run([BIN / "patchcache", "--help"], capture_output=True, check=True)
        return time.perf_counter() - started

    # The best of several: other processes share the machine.
    times = [seconds()]
    while min(times) >= 0.3 and len(times) < 20:
        times.append(seconds())
    assert min(times) < 0.3


def test_the_import_contracts_hold():
    done = subprocess.run([BIN / "lint-imports"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_module_is_small_enough_to_read():
    root = Path(__file__).parent.parent
    lengths = {
        path.relative_to(root).as_posix(): len(path.read_text().splitlines())
        for package in ("cache_builder", "tokenizers_svc", "trainer")
        for path in (root / package).rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > 500} == {}
