"""What a supervisor asks: is the process alive, should clients come here, how does it do."""

import platform
from importlib.metadata import version

import torch
from fastapi import FastAPI, Request, Response

from tokenizers_svc.problems import ProblemError, documented
from tokenizers_svc.request_fields import field_of
from tokenizers_svc.schemas import Health, Version
from tokenizers_svc.service import TokenizeService, not_ready


def add_routes(app: FastAPI) -> None:
    """Add /healthz, /readyz, /metrics and /version."""
    app.add_api_route("/healthz", check_health, tags=["probes"])
    app.add_api_route(
        "/readyz", check_readiness, tags=["probes"], responses=documented("not-ready", "draining")
    )
    app.add_api_route(
        "/metrics",
        tell_metrics,
        tags=["probes"],
        response_class=Response,
        responses={
            200: {
                "description": "for Prometheus: text, or OpenMetrics if it is accepted",
                "content": {
                    media_type: {"schema": {"type": "string"}}
                    for media_type in ("text/plain", "application/openmetrics-text")
                },
            }
        },
    )
    app.add_api_route("/version", tell_version, tags=["probes"])


async def check_health() -> Health:
    """Answer, to show that the process is alive."""
    return Health(status="alive")


async def check_readiness(request: Request) -> Health:
    """Answer 200 when clients should be sent here, 503 with the reason when not."""
    service: TokenizeService = request.app.state.service
    reason = service.why_not_ready()
    if reason is not None and service.is_draining:
        raise ProblemError("draining", reason, headers={"Retry-After": "1"})
    if reason is not None:
        raise not_ready(reason)
    return Health(status="ready")


async def tell_metrics(request: Request) -> Response:
    """Return what the service has counted; docs/service-operations.md lists the names."""
    service: TokenizeService = request.app.state.service
    request.app.state.audience.tell()  # the metrics are among it
    content, media_type = service.metrics.render(field_of(request.scope, b"accept", ""))
    return Response(content, headers={"Content-Type": media_type})


async def tell_version() -> Version:
    """Return which program answers."""
    return Version(
        patchcache=version("patchcache"), python=platform.python_version(), torch=torch.__version__
    )
