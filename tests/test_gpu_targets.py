"""`make gpu-check` and `make gpu-bench` ask for what images for GPUs have, and for nothing else."""

import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.places import ROOT

ASKED_FOR = ("torch", "torchvision", "timm", "numpy", "safetensors")
NOT_THERE = ("pydantic", "pytest", "hypothesis", "rich", "typer", "ray", "faiss", "zarr", "fastapi")


def with_what_it_needs(name, found):
    """Add a distribution and those that it requires, without extras."""
    if canonicalize_name(name) in found:
        return
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return  # of another platform
    found[canonicalize_name(name)] = distribution
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            with_what_it_needs(requirement.name, found)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Return a function that runs a Python which finds those distributions alone."""
    packages, found = tmp_path_factory.mktemp("bare"), {}
    for name in ASKED_FOR:
        with_what_it_needs(name, found)
    for distribution in found.values():
        for top in {path.parts[0] for path in distribution.files if path.parts[0] != ".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))

    def run(*words):
        # -S: the folder of installed packages is not looked into.
        command = [sys.executable, "-S", *words]
        env = {"PYTHONPATH": f"{packages}:{ROOT}", "PATH": "", "HOME": str(packages)}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    return run


def test_the_image_is_bare(bare):
    program = f"from importlib.util import find_spec; print(*map(find_spec, {NOT_THERE}))"
    assert bare("-c", program).stdout.split() == ["None"] * len(NOT_THERE)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_test_is_skipped_with_the_reason(bare):
    done = bare("-m", "tests.devices")
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) >= 20
    assert all(re.fullmatch(r"skipped \S+ \(torch sees no CUDA device\)", line) for line in lines)
    assert last.endswith(f"torch sees no CUDA device: 0 passed, 0 failed, {len(lines)} skipped")


@pytest.mark.slow
def test_the_tests_of_devices_run_there(bare):
    words = ("pixel", "tie", "host_waits", "goes_on", "alone", "same_bytes")
    done = bare("-m", "tests.devices", "--device", "cpu", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(\d+) passed, 0 failed, 0 skipped", done.stdout)


@pytest.mark.slow
def test_a_benchmark_runs_there_and_says_that_it_is_not_a_gpus(bare):
    done = bare("-m", "tests.devices.bench", "--device", "cpu", "--only", "nearest")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No CUDA device: small sizes on the CPU.")
    assert re.search(r"^\| nearest, 5,000 patches +\|.* 0 \|$", done.stdout, re.MULTILINE)


def test_a_word_that_no_test_has_is_a_mistake(bare):
    done = bare("-m", "tests.devices", "--device", "cpu", "nothing_like_it")
    assert done.returncode == 2
    assert "no test is called like nothing_like_it" in done.stderr


def test_make_runs_them_with_the_python_at_hand():
    makefile = (ROOT / "Makefile").read_text()
    for target, module in (("gpu-check", "tests.devices"), ("gpu-bench", "tests.devices.bench")):
        assert re.search(rf"^{target}:  ##.*\n\t\$\(PYTHON\) -m {module}$", makefile, re.MULTILINE)
