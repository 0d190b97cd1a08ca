"""The fields of KubeRay's v1 objects that our files use, by its API reference; others are errors.

A pod template is checked as Kubernetes' own PodTemplate.
"""
# ruff: noqa: N815 - the names are KubeRay's

import functools
from typing import Annotated, Any, Literal

import kubernetes_validate
from pydantic import AfterValidator, BaseModel, Field

# They are large, and read for every object.
kubernetes_validate.utils.schema_contents = functools.cache(
    kubernetes_validate.utils.schema_contents
)

VERSIONS = ("1.29", "1.37")
"""Of Kubernetes: the oldest and the newest that the files are held against."""


def check_object(data):
    """Check a Kubernetes object; unknown fields are errors."""
    for version in VERSIONS:
        kubernetes_validate.validate(data, version, strict=True)


def _check_template(template):
    try:
        check_object({"apiVersion": "v1", "kind": "PodTemplate", "template": template})
    except kubernetes_validate.ValidationError as exc:
        raise ValueError(exc.message) from exc
    return template


def _check_part(name):
    def check(value):
        _check_template({"spec": {"containers": [{"name": "x", "image": "x", name: value}]}})
        return value

    return check


Template = Annotated[dict[str, Any], AfterValidator(_check_template)]
Resources = Annotated[dict[str, Any], AfterValidator(_check_part("resources"))]
SecurityContext = Annotated[dict[str, Any], AfterValidator(_check_part("securityContext"))]


class Strict(BaseModel, frozen=True, extra="forbid", strict=True):
    """No other fields, and no number where a text belongs."""


class Metadata(Strict):
    name: str
    labels: dict[str, str] = {}


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: Template


class WorkerGroup(Strict):
    groupName: str
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    rayStartParams: dict[str, str]
    template: Template


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: int
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    resources: Resources
    securityContext: SecurityContext


class ClusterSpec(Strict):
    rayVersion: str
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class JobSpec(Strict):
    entrypoint: str
    backoffLimit: int
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    rayClusterSpec: ClusterSpec


class ServiceSpec(Strict):
    serveConfigV2: str
    rayClusterConfig: ClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec
