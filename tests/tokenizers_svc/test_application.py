"""Two ways to a route, one set of layers around both."""

import asyncio

import httpx
import pytest
from fastapi import Response

from tests.tokenizers_svc.observed import told
from tokenizers_svc.application import Application
from tokenizers_svc.middleware import CommonHeaders
from tokenizers_svc.problems import ProblemError, answer_problem
from tokenizers_svc.queries import DirectRoute, NoQuery


async def echo(request, query: NoQuery):
    return Response(await request.body())


async def name(request, query: NoQuery, name: str):
    return Response(name)


async def refuse(request, query: NoQuery):
    raise ProblemError("bad-request", "It is refused.")


async def fail(request, query: NoQuery):
    raise ZeroDivisionError


@pytest.fixture
def records():
    return []


@pytest.fixture
def app(records):
    app = Application(exception_handlers={ProblemError: answer_problem})
    app.add_middleware(CommonHeaders, fingerprint=lambda: "f" * 64, is_draining=lambda: False)
    app.add_middleware(told, observers=[records.append])
    for path, endpoint in {
        "/echo": echo, "/names/{name}": name, "/refuse": refuse, "/fail": fail,
    }.items():  # fmt: skip
        app.router.add_api_route(
            path, endpoint, methods=["POST"], route_class_override=DirectRoute, response_model=None
        )
    return app


def ask(app, method, path, **options):
    async def once():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, **options)

    return asyncio.run(once())


def test_a_path_without_a_name_in_it_passes_our_layers_and_none_of_fastapis(app, records):
    answer = ask(app, "POST", "/echo", content=b"picture")
    assert (answer.status_code, answer.content) == (200, b"picture")
    assert app.middleware_stack is None  # FastAPI makes it for its first request
    assert answer.headers["x-tokenizer-fingerprint"] == "f" * 64
    assert [(record.route, record.status) for record in records] == [("/echo", 200)]


@pytest.mark.parametrize("path", ["/refuse", "/refuse?any=1", "/echo?any=1"])
def test_a_refusal_is_the_same_problem_as_everywhere(app, records, path):
    answer = ask(app, "POST", path)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad-request")
    assert answer.json()["instance"] == f"urn:request:{answer.headers['x-request-id']}"
    assert records[0].problems == ["bad-request"]


def test_what_fails_without_a_handler_is_a_500_that_says_nothing(app, records):
    answer = ask(app, "POST", "/fail")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "Zero" not in answer.text
    assert (records[0].route, records[0].status) == ("/fail", 500)


def test_names_in_paths_and_other_methods_are_for_fastapi(app, records):
    assert ask(app, "POST", "/names/x").text == "x"
    assert app.middleware_stack is not None
    assert ask(app, "GET", "/echo").status_code == 405
    assert [record.route for record in records] == ["/names/{name}", "/echo"]
