"""What a supervisor asks: is the process alive, should clients come here, which version is it."""

import platform
from importlib.metadata import version

import torch
from fastapi import FastAPI, Request

from tokenizers_svc.problems import ProblemError, documented
from tokenizers_svc.schemas import Health, Version
from tokenizers_svc.service import TokenizeService, not_ready


def add_routes(app: FastAPI) -> None:
    """Add /healthz, /readyz and /version."""
    app.add_api_route("/healthz", check_health, tags=["probes"])
    app.add_api_route(
        "/readyz", check_readiness, tags=["probes"], responses=documented("not-ready", "draining")
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


async def tell_version() -> Version:
    """Return which program answers."""
    return Version(
        patchcache=version("patchcache"), python=platform.python_version(), torch=torch.__version__
    )
