"""What is shipped, and what installing it brings along."""

import ctypes
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.utils import canonicalize_name

from cache_builder import __version__
from cache_builder.requirements import demands, extras, requirements_of
from cache_builder.tokenizers.kernels.build import LIBRARY
from tests.places import ROOT

PACKAGES = ("cache_builder", "tokenizers_svc", "trainer")
KERNEL = LIBRARY.relative_to(ROOT).as_posix()


def shipped():
    """Every file of the packages that is kept in the repository."""
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so", ".dylib")
    }
    assert any(name.endswith(".toml") for name in files)
    assert any(name.endswith(".html") for name in files)
    return files


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(folder))
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"patchcache-{__version__}"


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """The wheel of those sources, unpacked, from a machine without a compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        patch.delenv("CXX", raising=False)
        (path,) = WheelBuilder(str(sources)).build(directory=str(folder))
    assert Path(path).name == f"patchcache-{__version__}-py3-none-any.whl"
    zipfile.ZipFile(path).extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def metadata(wheel):
    return Distribution.at(wheel / f"patchcache-{__version__}.dist-info")


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_sources_hold_what_a_wheel_needs_and_nothing_else(sources):
    beside = {"PKG-INFO", "README.md", "CHANGELOG.md", "pyproject.toml", "deploy/build_hook.py"}
    found = names(sources)
    assert found - {".gitignore"} == shipped() | beside


def test_a_wheel_without_a_compiler_holds_the_packages_whole(wheel):
    found = {name for name in names(wheel) if ".dist-info/" not in name}
    assert found == shipped()
    assert {f"{package}/py.typed" for package in PACKAGES} <= found


def test_the_version_stands_in_one_place(metadata):
    assert metadata.version == __version__
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def brought(of, *wanted):
    """Everything that an installation brings: names, as far as they are installed here."""
    waiting = [found.requirement for extra in ("", *wanted) for found in demands(of, extra)]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                try:
                    waiting += requirements_of(distribution(name), extra)
                except PackageNotFoundError:
                    continue
    return {name for name, _ in seen}


HEAVY = {"torch", "ray", "faiss-cpu", "faiss-gpu", "open-clip-torch", "fastapi", "starlette"}


@pytest.mark.parametrize(
    ("extra", "wanted", "banned"),
    [
        ("", {"numpy", "typer"}, HEAVY | {"zarr", "timm", "uvicorn"}),
        ("client", {"httpx", "msgpack"}, HEAVY),
        ("train", {"torch", "timm", "zarr"}, HEAVY - {"torch"} | {"uvicorn", "webdataset"}),
        ("serve", {"torch", "fastapi", "uvicorn"}, {"ray", "faiss-cpu", "faiss-gpu", "zarr"}),
        ("build", {"torch", "ray", "zarr", "pyarrow"}, {"faiss-cpu", "faiss-gpu", "fastapi"}),
    ],
)
def test_an_extra_brings_what_its_program_needs_and_no_other_program(
    metadata, extra, wanted, banned
):
    found = brought(metadata, extra) if extra else brought(metadata)
    assert wanted <= found
    assert not found & banned


def test_every_extra_fits_the_versions_that_everything_is_tested_with(metadata):
    pins = dict(
        line.split("==")
        for line in (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    assert {"build", "serve", "train"} <= set(extras(metadata))
    for extra in ("", "dev", *extras(metadata)):
        for found in demands(metadata, extra):
            version = pinned[canonicalize_name(found.requirement.name)]
            assert found.requirement.specifier.contains(version), (extra, found.requirement)


@pytest.mark.slow
def test_a_wheel_with_kernels_runs_on_every_processor_of_its_platform(tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"patchcache-{__version__}-py3-none-(?!any)\w+\.whl", wheel.name)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert {n for n in names(tmp_path / "site") if ".dist-info/" not in n} == shipped() | {KERNEL}
    library = tmp_path / "site" / KERNEL
    loaded = ctypes.CDLL(str(library))
    assert loaded.patchcache_choose(b"portable")
    assert not shared_code_that_needs_avx(library)


def shared_code_that_needs_avx(library):
    """Return functions that every variant calls and that only newer processors run."""
    if shutil.which("objdump") is None or shutil.which("nm") is None:
        pytest.skip("there is no objdump")
    run = {"capture_output": True, "text": True, "check": True}
    symbols = subprocess.run(["nm", library], **run).stdout.splitlines()
    shared = {symbol.split()[-1] for symbol in symbols if symbol.split()[-2] in ("W", "V", "T")}
    assert "patchcache_assign" in shared
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library], **run).stdout
    bodies = re.findall(r"^\w+ <(.+)>:\n((?:.+\n)*)", code, re.MULTILINE)
    assert shared & {name for name, _ in bodies}
    return [name for name, body in bodies if name in shared and re.search(r"%[yz]mm|\tv\w+ ", body)]
