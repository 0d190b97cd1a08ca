"""The Dockerfiles of deploy/docker as lists of instructions, and what Docker sees of the tree."""

import io
import json
import shlex
from typing import NamedTuple

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

from tests.places import ROOT

IMAGES = ("builder", "service", "trainer")


class Step(NamedTuple):
    """One instruction."""

    name: str
    value: str


class Dockerfile:
    """One file: its stages, and what holds in the last one."""

    def __init__(self, image):
        self.path = ROOT / "deploy" / "docker" / f"{image}.Dockerfile"
        parser = DockerfileParser(fileobj=io.BytesIO(self.path.read_bytes()), build_args={})
        steps = [Step(x["instruction"], x["value"]) for x in parser.structure]
        steps = [step for step in steps if step.name != "COMMENT"]
        self.steps = steps
        starts = [i for i, step in enumerate(steps) if step.name == "FROM"]
        self.arguments = self._arguments(steps)
        self.stages = [
            steps[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)
        ]
        self.final = self.stages[-1]

    @staticmethod
    def _arguments(steps):
        """Defaults of the build arguments; the first one counts."""
        pairs = [step.value.partition("=") for step in reversed(steps) if step.name == "ARG"]
        return {name: default for name, _, default in pairs}

    def last(self, name):
        """The value of the last such instruction of the image."""
        values = [step.value for step in self.final if step.name == name]
        return values[-1] if values else None

    def words(self, name):
        """The words of an instruction in its exec form: ENTRYPOINT, CMD, HEALTHCHECK CMD."""
        value = self.last(name)
        return json.loads(value[value.index("[") :]) if value else []

    def environment(self):
        """What ENV sets, with $PATH as it stands."""
        words = [shlex.split(step.value) for step in self.final if step.name == "ENV"]
        return dict(word.split("=", 1) for line in words for word in line)

    def labels(self):
        words = [shlex.split(step.value) for step in self.final if step.name == "LABEL"]
        return dict(word.split("=", 1) for line in words for word in line)

    def extras(self):
        return self.arguments["EXTRAS"].split(",")

    def copied(self):
        """The sources of every COPY from the tree."""
        for step in self.steps:
            if step.name == "COPY" and not step.value.startswith("--from="):
                yield from shlex.split(step.value)[:-1]


def context():
    """The files that .dockerignore lets through, by their paths from the root."""
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    return {path for path in exclude_paths(str(ROOT), patterns) if (ROOT / path).is_file()}
