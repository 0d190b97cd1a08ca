"""What an image installs: the dependencies of some extras, at the versions that are tested.

A Dockerfile runs this before it copies the sources, so that the layer with torch changes with
pyproject.toml and constraints.txt alone. Standard library only. The environment is one without pip.

Which torch an image holds is a matter of where pip looks: PIP_EXTRA_ARGS has options for that. It
is checked afterwards, because pip itself takes whichever build it finds.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tomllib
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BUILT_FOR = "import torch; print('cuda' if torch.version.cuda else 'cpu', torch.__version__)"


class InstallError(Exception):
    """What was asked for cannot be installed; the text says why."""


def requirements(project: Mapping[str, Any], extras: Sequence[str]) -> list[str]:
    """Return what a project requires with some of its extras, without the project itself.

    Args:
        project: The table `project` of pyproject.toml.
        extras: Names; an extra may name others of the same project, as `patchcache[tokens]`.

    Raises:
        InstallError: There is no such extra.
    """
    known = project["optional-dependencies"]
    of_itself = re.compile(rf"{re.escape(project['name'])}\[([\w,\s-]+)\]")
    found = dict.fromkeys(project["dependencies"])
    seen: set[str] = set()
    left = list(extras)
    while left:
        extra = left.pop().strip()
        if extra not in known:
            names = ", ".join(sorted(known))
            raise InstallError(f"{project['name']} has no extra {extra!r}. It has: {names}.")
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in known[extra]:
            if match := of_itself.fullmatch(requirement):
                left.extend(match[1].split(","))
            else:
                found[requirement] = None
    return list(found)


def check_device(python: Path, device: str) -> None:
    """Make sure that the torch of an environment is built for a device.

    Raises:
        InstallError: It is built for another one.
    """
    answer = subprocess.run(
        [python, "-c", _BUILT_FOR], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    built_for, version = answer.split()
    if built_for != device:
        raise InstallError(
            f"DEVICE is {device}, but pip has installed torch {version}, which is built for "
            f"{built_for}. Pass PIP_EXTRA_ARGS with options of pip that lead it to builds for "
            f"{device}, or DEVICE={built_for}."
        )


def main() -> None:
    """Make the environment that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--extras", required=True, help="names with commas between")
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--constraints", type=Path, required=True)
    parser.add_argument("--project", type=Path, required=True, help="pyproject.toml")
    parser.add_argument("--into", type=Path, required=True, help="the environment that is made")
    arguments = parser.parse_args()
    project = tomllib.loads(arguments.project.read_text())["project"]
    try:
        wanted = requirements(project, arguments.extras.split(","))
        venv.create(arguments.into, symlinks=True)
        python = arguments.into / "bin" / "python"
        subprocess.run(
            [
                sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check",
                "install", "--constraint", arguments.constraints,
                *shlex.split(os.environ.get("PIP_EXTRA_ARGS", "")), *wanted,
            ],
            check=True,
        )  # fmt: skip
        check_device(python, arguments.device)
    except InstallError as exc:
        sys.exit(f"{parser.prog}: {exc}")
    except subprocess.CalledProcessError as exc:
        sys.exit(exc.returncode)  # pip has said why


if __name__ == "__main__":
    main()
