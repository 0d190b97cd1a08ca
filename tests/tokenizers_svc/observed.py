"""What is observed: an application for metrics, logs and traces, and the state of a model."""

import asyncio
import time

import httpx
from fastapi import FastAPI, Request

from tokenizers_svc.health import ModelState
from tokenizers_svc.observation import Audience, Observation
from tokenizers_svc.problems import ProblemError, problem_response

MODEL = ModelState(
    "tiny", "ab" * 32, "pixel", 4, "cpu", True, True,
    num_waiting=3, num_running=2, num_batches=7, num_dropped=1, busy_s=0.5,
)  # fmt: skip


def make_app(*observers):
    """An application whose routes note what those of the service note."""
    app = FastAPI()

    @app.post("/v1/models/{name}")
    async def tokenize(request: Request, name: str):
        await request.body()
        record = request.state.record
        request.state.request_id = "r-1"
        record.model, record.num_images = "tiny", 1
        for stage, seconds in (("read", 0.001), ("decode", 0.002), ("queue", 0.3), ("infer", 0.04)):
            record.add_stage(stage, seconds, ended=time.perf_counter())
        return {"name": name}

    @app.get("/readyz")
    async def refuse():
        return problem_response(ProblemError("not-ready", "It loads."), "r-2")

    @app.get("/broken")
    async def fail():
        raise ValueError("a reason")

    return told(app, observers)


def told(app, observers):
    """`app`, whose requests have been told of to the observers before anybody goes on."""
    audience = Audience(*observers)
    observed = Observation(app, audience=audience)

    async def call(*arguments):
        try:
            await observed(*arguments)
        finally:
            audience.tell()

    return call


def ask(app, method, path, **options):
    async def in_loop():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(in_loop())
