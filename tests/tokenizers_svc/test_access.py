"""Keys: who gets in where, what a refusal says, and that no secret ever leaves."""

import asyncio
import hashlib
import logging

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cache_builder.errors import ConfigError
from tests.tokenizers_svc.support import check_problem, make_tokenizer
from tokenizers_svc.access import (
    Access,
    AccessControl,
    AccessOptions,
    allow_origins,
    check_exposure,
)
from tokenizers_svc.app import create_app
from tokenizers_svc.middleware import CommonHeaders
from tokenizers_svc.options import ServiceOptions
from tokenizers_svc.serve import announce, with_environment

USER = "user-key-0123456789"
OTHER = "another-key-0123456789"
ADMIN = "admin-key-0123456789"
WRONG = "wrong-key-0123456789"
OPEN = ["/", "/page/page.js", "/healthz", "/readyz"]
SHUT = ["/v1/models", "/v1/tokenize", "/version", "/metrics", "/docs", "/openapi.json", "/nothing"]
ADMINISTRATION = ["/v1/admin/models/m:reload", "/v1/admin/nothing"]


async def say_who(request):
    return PlainTextResponse(str(request.state.key_name))


def bearer(key):
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def client_of(access):
    app = Starlette(routes=[Route("/{path:path}", say_who, methods=["GET", "POST"])])
    guarded = AccessControl(app, access=access)
    crossing = allow_origins(guarded, access.options.cors_origins)
    named = CommonHeaders(crossing, fingerprint=lambda: "f" * 64, is_draining=lambda: False)
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(named), base_url="http://service", verify=False
    )


def ask(access, path, key=None, method="GET", headers=None):
    async def once():
        async with client_of(access) as client:
            return await client.request(method, path, headers=headers or bearer(key))

    return asyncio.run(once())


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    path.write_text(f"# who may use it\n\n{USER} alice\n  sha256:{digest}\tthe lab  \n")
    return path


@pytest.fixture
def access(key_file):
    return Access(AccessOptions(key_file=key_file, admin_keys=(ADMIN,)))


@pytest.mark.parametrize("key", [None, WRONG, USER, ADMIN])
def test_the_matrix_of_paths_and_keys(access, key):
    expected = {None: 401, WRONG: 401, USER: 200, ADMIN: 200}[key]
    for path in OPEN:
        assert ask(access, path, key).status_code == 200
    for path in SHUT:
        assert ask(access, path, key).status_code == expected, path
    for path in ADMINISTRATION:
        answer = ask(access, path, key, method="POST")
        assert answer.status_code == {401: 401, 200: 200 if key == ADMIN else 403}[expected]


def test_a_missing_key_is_told_how_to_send_one(access):
    answer = ask(access, "/v1/tokenize")
    problem = check_problem(answer, 401, "unauthorized")
    assert "Authorization: Bearer KEY" in problem["detail"]
    assert answer.headers["www-authenticate"] == 'Bearer realm="patchcache"'
    check_problem(ask(access, "/v1/admin/x", USER), 403, "forbidden")


@pytest.mark.parametrize(
    "header",
    [
        "", "Bearer", "Bearer ", USER, f"Basic {USER}", f"Bearer {USER}x", f"Bearer {USER[:-1]}",
        f"Bearer {USER.upper()}", f"Bearer {USER} alice", "Bearer \xe9\xe9",
        f"Bearer {hashlib.sha256(USER.encode()).hexdigest()}",
        f"Bearer sha256:{hashlib.sha256(USER.encode()).hexdigest()}",
    ],
)  # fmt: skip
def test_what_only_resembles_a_key_is_refused(access, header):
    headers = [(b"authorization", header.encode("latin-1"))]
    check_problem(ask(access, "/v1/models", headers=headers), 401, "unauthorized")


def test_the_scheme_is_written_as_one_likes(access):
    assert ask(access, "/v1/models", headers={"Authorization": f"bearer  {USER}"}).text == "alice"


def test_the_application_learns_the_name_of_the_key(access):
    assert ask(access, "/v1/models", USER).text == "alice"
    assert ask(access, "/v1/models", OTHER).text == "the lab"
    assert ask(access, "/v1/models", ADMIN).text == "admin key 1"
    assert ask(access, "/healthz").text == "None"


def test_a_key_that_is_both_is_an_admin_key():
    access = Access(AccessOptions(keys=(USER,), admin_keys=(USER,)))
    assert ask(access, "/v1/admin/x", USER).status_code == 200


def test_without_keys_all_is_open_but_the_administration():
    access = Access(AccessOptions())
    assert not access.is_restricted
    for path in [*OPEN, *SHUT]:
        assert ask(access, path).status_code == 200
    problem = check_problem(ask(access, "/v1/admin/x", ADMIN), 403, "forbidden")
    assert "Administration is off" in problem["detail"]


def test_an_admin_key_alone_leaves_the_rest_open():
    access = Access(AccessOptions(admin_keys=(ADMIN,)))
    assert ask(access, "/v1/models").status_code == 200
    assert ask(access, "/v1/admin/x").status_code == 401
    assert ask(access, "/v1/admin/x", ADMIN).status_code == 200


def test_metrics_and_docs_can_be_opened():
    options = AccessOptions(open_metrics=True, open_docs=True, keys=(USER,))
    access = Access(options)
    for path in ("/metrics", "/docs", "/openapi.json"):
        assert ask(access, path).status_code == 200
    assert ask(access, "/v1/models").status_code == 401


def test_keys_are_reloaded_and_a_bad_file_leaves_the_old_ones(access, key_file):
    key_file.write_text(f"{WRONG}\n")
    assert access.reload() == 2
    assert ask(access, "/v1/models", WRONG).status_code == 200
    assert ask(access, "/v1/models", USER).status_code == 401
    key_file.write_text("short\n")
    with pytest.raises(ConfigError, match=r"Line 1 of .*keys is too weak"):
        access.reload()
    assert ask(access, "/v1/models", WRONG).status_code == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "There is no key in"),
        (b"# nothing\n\n", "There is no key in"),
        (b"# a\nsecret-short", "Line 2 of .*/keys is too weak or cannot be sent.*openssl rand"),
        (b"a" * 257, "16 to 256 printable ASCII"),
        ("sch\u00f6ner-schl\u00fcssel-12345".encode(), "printable ASCII"),
        (b"sha256:ABCDEF", "Line 1 of .* is no SHA-256 digest"),
        (b"\xff\xfe\x00secret", "Cannot read the keys in .*: it is not UTF-8 text"),
    ],
)
def test_a_bad_file_of_keys_is_refused_without_repeating_it(tmp_path, content, message):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Access(AccessOptions(key_file=path))
    assert "secret" not in str(caught.value)
    assert "aaaa" not in str(caught.value)


def test_a_missing_file_of_keys_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"none: No such file or directory\. Pass [^\n]*\.$"):
        Access(AccessOptions(admin_key_file=tmp_path / "none"))


@pytest.mark.parametrize("origin", ["*", "example.org", "https://example.org/page", "null", ""])
def test_an_origin_is_named_whole(origin):
    with pytest.raises(ConfigError, match="is no origin"):
        Access(AccessOptions(cors_origins=(origin,)))


def test_no_key_is_in_a_log_an_answer_or_a_representation(access, caplog):
    caplog.set_level(logging.DEBUG)
    answers = [ask(access, path, key) for path in SHUT for key in (USER, WRONG, ADMIN)]
    answers += [ask(access, "/v1/admin/x", key) for key in (USER, WRONG)]
    said = [caplog.text, repr(access.options), repr(vars(access))]
    said += [f"{answer.headers}{answer.text}" for answer in answers]
    for text in said:
        for key in (USER, OTHER, ADMIN, WRONG):
            assert key not in text


PREFLIGHT = {
    "Origin": "https://good.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}


def test_pages_of_a_named_origin_may_ask_and_others_may_not():
    options = AccessOptions(cors_origins=("https://good.example",), keys=(USER,))
    access = Access(options)
    allowed = ask(access, "/v1/tokenize", method="OPTIONS", headers=PREFLIGHT)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://good.example"
    assert "access-control-allow-credentials" not in allowed.headers
    evil = PREFLIGHT | {"Origin": "https://evil.example"}
    refused = ask(access, "/v1/tokenize", method="OPTIONS", headers=evil)
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    for origin, is_good in (("https://good.example", True), ("https://evil.example", False)):
        answer = ask(access, "/v1/models", headers=bearer(USER) | {"Origin": origin})
        assert ("access-control-allow-origin" in answer.headers) == is_good
    problem = ask(access, "/v1/models", headers={"Origin": "https://good.example"})
    check_problem(problem, 401, "unauthorized")
    assert problem.headers["access-control-allow-origin"] == "https://good.example"


def test_without_origins_no_page_may_ask(access):
    answer = ask(access, "/v1/models", headers=bearer(USER) | {"Origin": "https://good.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
def test_strangers_are_not_served_without_keys(host, access):
    nobody = Access(AccessOptions(admin_keys=(ADMIN,)))
    with pytest.raises(ConfigError, match=r"it has no keys.*--key-file.*--insecure"):
        check_exposure(host, nobody, insecure=False)
    check_exposure(host, nobody, insecure=True)
    check_exposure(host, access, insecure=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_at_the_loopback_no_keys_are_needed(host):
    check_exposure(host, Access(AccessOptions()), insecure=False)


@pytest.mark.parametrize(("keys", "is_warned"), [((), True), ((USER,), False)])
def test_the_log_warns_of_a_service_without_keys_alone(caplog, keys, is_warned):
    options = ServiceOptions(access=AccessOptions(keys=keys))
    with caplog.at_level("INFO"):
        announce(create_app(make_tokenizer(), options=options), "192.0.2.1", 8000)
    assert ("there is no authentication" in caplog.text) == is_warned


def test_keys_come_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("PATCHCACHE_SERVE_KEYS", f"{USER} alice, {OTHER}")
    monkeypatch.setenv("PATCHCACHE_SERVE_ADMIN_KEYS", ADMIN)
    options = with_environment(ServiceOptions(access=AccessOptions(open_docs=True)))
    assert options.access.open_docs
    assert USER not in repr(options)
    access = Access(options.access)
    assert ask(access, "/v1/models", USER).text == "alice"
    assert ask(access, "/v1/models", OTHER).text == "user key 2"
    assert ask(access, "/v1/admin/x", ADMIN).status_code == 200


def test_an_empty_environment_changes_nothing(monkeypatch):
    monkeypatch.setenv("PATCHCACHE_SERVE_KEYS", "")
    monkeypatch.delenv("PATCHCACHE_SERVE_ADMIN_KEYS", raising=False)
    assert with_environment(ServiceOptions()) == ServiceOptions()
