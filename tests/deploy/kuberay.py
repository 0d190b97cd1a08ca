"""The fields of KubeRay's v1 objects that our files use; others are errors.

Names, types and what is required are those of the Go types in KubeRay's `ray-operator/apis/ray/v1`,
of which its CRDs are made; the rules about values are those by which its operator refuses an object
(`controllers/ray/utils/validation.go`). The CRDs themselves are not here: they repeat all of a pod,
1.3 MB. A pod template is checked as Kubernetes' own PodTemplate.
"""
# ruff: noqa: N815 - the names are KubeRay's

import functools
from typing import Annotated, Any, Literal

import kubernetes_validate
from pydantic import AfterValidator, BaseModel, Field, model_validator

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
    if not template["spec"]["containers"]:
        raise ValueError("containers: a group has at least one")
    return template


def _check_part(name):
    def check(value):
        _check_template({"spec": {"containers": [{"name": "x", "image": "x", name: value}]}})
        return value

    return check


Template = Annotated[dict[str, Any], AfterValidator(_check_template)]
Resources = Annotated[dict[str, Any], AfterValidator(_check_part("resources"))]
Count = Annotated[int, Field(ge=0, lt=2**31)]  # int32; KubeRay refuses those below 0
# A label of DNS, short enough for the 53 of a cluster's name, which has six more.
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
SecurityContext = Annotated[dict[str, Any], AfterValidator(_check_part("securityContext"))]


class Strict(BaseModel, frozen=True, extra="forbid", strict=True):
    """No other fields, and no number where a text belongs."""


class Metadata(Strict):
    name: Name
    labels: dict[str, str] = {}


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: Template


class WorkerGroup(Strict):
    groupName: str
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str]
    template: Template

    @model_validator(mode="after")
    def _check(self):
        if self.minReplicas > self.maxReplicas:
            raise ValueError("minReplicas: there are more than maxReplicas")
        return self


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: Count
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
    backoffLimit: Count
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    rayClusterSpec: ClusterSpec

    @model_validator(mode="after")
    def _check(self):
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished: nothing is shut down")
        return self


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
