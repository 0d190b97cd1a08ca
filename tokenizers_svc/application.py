"""FastAPI for the documents and the rare paths, a dictionary for the paths that take pictures.

What FastAPI has around every request (telemetry, exit stacks, two handlers of errors, a search
through all routes) takes a third of a request's time in the event loop, where it holds up everyone.
Our own layers (keys, request ids, records) are around both ways, and routes with a name in their
path go the long one.
"""

from functools import cached_property

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenizers_svc.exchange import answer_nobody
from tokenizers_svc.problems import ProblemError, answer_problem
from tokenizers_svc.queries import DirectRoute


class Application(FastAPI):
    """An application whose `DirectRoute`s of a fixed path are answered without FastAPI's layers.

    Routes and layers are complete before the first request.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or follow the life of the server."""
        is_http = scope["type"] == "http"
        route = self._direct.get((scope["method"], scope["path"])) if is_http else None
        if route is None:
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        scope["route"] = route
        await self._layers(scope, receive, send)

    @cached_property
    def _direct(self) -> dict[tuple[str, str], DirectRoute]:
        return {
            (method, route.path): route
            for route in self.routes
            if isinstance(route, DirectRoute) and not route.param_convertors
            for method in route.methods or ()
        }

    @cached_property
    def _layers(self) -> ASGIApp:
        """What `add_middleware` was given, around `answer_directly`."""
        app: ASGIApp = answer_directly
        for layer in reversed(self.user_middleware):
            app = layer.cls(app, *layer.args, **layer.kwargs)
        return app


async def answer_directly(scope: Scope, receive: Receive, send: Send) -> None:
    """Call the function of the route that `scope` holds, and send what it returns or refuses."""
    request = Request(scope, receive, send)
    route: DirectRoute = scope["route"]
    try:
        response = await route.answer(request)
    except ProblemError as problem:
        response = await answer_problem(request, problem)
    except ClientDisconnect as gone:
        response = await answer_nobody(request, gone)
    await response(scope, receive, send)
