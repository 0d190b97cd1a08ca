"""The objects of deploy/, as files or as kustomize puts them together, and the pods in them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.commands import parse_patchcache

DEPLOY = Path(__file__).parents[2] / "deploy"
IMAGES = {"patchcache-builder", "patchcache-service", "patchcache-trainer"}


def load(path):
    """Return the one object of a file below deploy/."""
    return yaml.safe_load((DEPLOY / path).read_text())


def kustomize(directory):
    """Return the objects of a kustomization by kind and name."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl, which has kustomize")
    command = ["kubectl", "kustomize", directory]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    objects = [item for item in yaml.safe_load_all(done.stdout) if item]
    return {(item["kind"], item["metadata"]["name"]): item for item in objects}


def check_is_confined(spec):
    """Check that a pod runs our images as nobody, writes to its volumes alone, and is bounded."""
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        confined = container["securityContext"]
        assert confined["allowPrivilegeEscalation"] is False
        assert confined["readOnlyRootFilesystem"] is True
        assert confined["capabilities"] == {"drop": ["ALL"]}
        assert container["image"].rpartition("/")[2].partition(":")[0] in IMAGES
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() <= volumes
        assert "/tmp" in mounts.values()
        if container in spec["containers"]:
            assert "/cache" in mounts.values()  # the home of the image's user


def command_of(container):
    """Parse what a container runs, with the variables that it sets itself in their places."""
    known = {variable["name"]: "4" for variable in container.get("env", ())}
    words = [
        re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], word)
        for word in (*container["command"], *container["args"])
    ]
    return parse_patchcache(words)
