"""Who may ask: API keys, admin keys, and web pages of other origins.

With keys, every path but the probes, the page and what `AccessOptions` opens wants
`Authorization: Bearer KEY`. Without keys everything is open but `/v1/admin/`, which is shut until
there is an admin key; an admin key opens everything.

A key file holds one key a line, and after white space a name for the logs; empty lines and lines
that begin with # are skipped. In place of a key may stand `sha256:` and its digest, so that the
file holds no secret:

    printf %s "$KEY" | sha256sum

Kept are digests alone, and an offered key is compared with all of them in constant time. No key is
ever logged, or part of an error.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

from pydantic import BaseModel, Field, SecretStr
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cache_builder.errors import ConfigError
from tokenizers_svc.problems import ProblemError, problem_response
from tokenizers_svc.request_fields import field_of

_PROBES: Final = ("/healthz", "/readyz")
_DOCS: Final = ("/docs", "/openapi.json")
_METRICS: Final = ("/metrics",)
_ADMIN: Final = "/v1/admin/"
_KEY: Final = re.compile(r"[\x21-\x7e]{16,256}")
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_ORIGIN: Final = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")
_REQUEST_HEADERS: Final = (
    "Authorization", "Content-Type", "If-None-Match", "Range", "X-Request-Id", "X-Request-Timeout",
)  # fmt: skip
_ANSWER_HEADERS: Final = (
    "ETag", "Retry-After", "Server-Timing", "X-Batch-Size", "X-Dtype", "X-PSNR", "X-Request-Id",
    "X-Shape", "X-Tokenizer-Fingerprint",
)  # fmt: skip

Role = Literal["user", "admin"]


class AccessOptions(BaseModel, frozen=True, extra="forbid"):
    """Where keys are, and what is open without one."""

    key_file: Path | None = Field(None, description="keys of those who may use the service")
    admin_key_file: Path | None = Field(None, description="keys that also open /v1/admin/")
    keys: tuple[SecretStr, ...] = Field((), description="further keys, as lines of a key file")
    admin_keys: tuple[SecretStr, ...] = Field((), description="the same for the administrator")
    cors_origins: tuple[str, ...] = Field(
        (), description="origins whose web pages may ask: https://example.org, without a path"
    )
    open_metrics: bool = Field(False, description="/metrics wants no key")
    open_docs: bool = Field(False, description="/docs and /openapi.json want no key")


class Key(NamedTuple):
    """One key, without the key."""

    name: str  # for the logs
    digest: bytes  # SHA-256
    role: Role


class Access:
    """The keys in force; `reload` takes those that the files hold now."""

    def __init__(self, options: AccessOptions) -> None:
        """Read the key files.

        Raises:
            ConfigError: A file cannot be read, holds no key or a bad one; an origin is none.
        """
        self.options = options
        self._given = [
            *_parse(_texts(options.keys), "user", "the keys that were given"),
            *_parse(_texts(options.admin_keys), "admin", "the admin keys that were given"),
        ]
        for origin in options.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"{origin!r} is no origin. Name each one by scheme and host: "
                    "https://example.org; there is no wildcard."
                )
        self._open_paths = frozenset(
            (
                *_PROBES,
                *(_METRICS if options.open_metrics else ()),
                *(_DOCS if options.open_docs else ()),
            )
        )
        self._keys = self._read()

    @property
    def is_restricted(self) -> bool:
        """Whether those who only want tokens need a key."""
        return any(key.role == "user" for key in self._keys)

    def reload(self) -> int:
        """Read the key files again and return how many keys there are.

        Raises:
            ConfigError: As at the start; the keys stay what they were.
        """
        self._keys = self._read()
        return len(self._keys)

    def find(self, offered: str) -> Key | None:
        """Return the key that was offered, None if it is not one of ours."""
        digest = hashlib.sha256(offered.encode("utf-8", "surrogateescape")).digest()
        # No early end: how long it takes tells nothing.
        matches = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        return matches[-1] if matches else None

    def judge(self, path: str, authorization: str) -> Key | None:
        """Return the key with which a request comes in, None if it needs none.

        Raises:
            ProblemError: 401 without a good key, 403 for a path that this key does not open.
        """
        is_admin_path = path.startswith(_ADMIN)
        if not is_admin_path and (not self.is_restricted or self._is_open(path)):
            return None
        if is_admin_path and not any(key.role == "admin" for key in self._keys):
            raise ProblemError(
                "forbidden", "Administration is off: the service has been given no admin key."
            )
        scheme, _, offered = authorization.partition(" ")
        key = self.find(offered.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise ProblemError(
                "unauthorized",
                "Send a key of this service in the header Authorization: Bearer KEY.",
                headers={"WWW-Authenticate": 'Bearer realm="patchcache"'},
            )
        if is_admin_path and key.role != "admin":
            raise ProblemError("forbidden", "Administration takes an admin key.")
        return key

    def _is_open(self, path: str) -> bool:
        return path == "/" or path.startswith("/page/") or path in self._open_paths

    def _read(self) -> tuple[Key, ...]:
        keys = list(self._given)
        if self.options.key_file is not None:
            keys += _read_file(self.options.key_file, "user")
        if self.options.admin_key_file is not None:
            keys += _read_file(self.options.admin_key_file, "admin")
        return tuple(sorted(keys, key=lambda key: key.role == "admin"))  # the stronger one wins


class AccessControl:
    """Pure ASGI middleware that lets in whom `Access` lets in."""

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        """Wrap `app`."""
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with the name of its key in the state, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        try:
            key = self._access.judge(scope["path"], field_of(scope, b"authorization", ""))
        except ProblemError as problem:
            refusal = problem_response(problem, state["request_id"])
            await refusal(scope, receive, send)
            return
        state["key_name"] = key.name if key else None
        await self._app(scope, receive, send)


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Return `app`, answering web pages of the given origins too; cookies are never allowed.

    It belongs outside of `AccessControl`: a browser asks whether it may before it sends a key.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=_REQUEST_HEADERS,
        expose_headers=_ANSWER_HEADERS,
        allow_credentials=False,
    )


def check_exposure(host: str, access: Access, *, insecure: bool) -> None:
    """Refuse to listen where strangers can reach a service that asks for no key.

    Raises:
        ConfigError: The address is not of the loopback, and there are no keys.
    """
    if is_exposed(host, access) and not insecure:
        raise ConfigError(
            f"Whoever can reach {host} could use the service: it has no keys. Pass a file of keys "
            "with --key-file, listen at 127.0.0.1, or say --insecure."
        )


def is_exposed(host: str, access: Access) -> bool:
    """Whether strangers can reach a service at this address that asks for no key."""
    return not access.is_restricted and not _is_loopback(host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _texts(secrets: Iterable[SecretStr]) -> list[str]:
    return [secret.get_secret_value() for secret in secrets]


def _read_file(path: Path, role: Role) -> list[Key]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"Cannot read the keys in {path}: {reason}. Pass a text file of one key a line."
        ) from None
    keys = _parse(lines, role, str(path))
    if not keys:
        # A service that is open because its file of keys is empty is what nobody asked for.
        raise ConfigError(f"There is no key in {path}. Write one a line, or pass no such file.")
    return keys


def _parse(lines: Iterable[str], role: Role, where: str) -> list[Key]:
    keys = []
    for number, line in enumerate(lines, 1):
        words = line.split(maxsplit=1)
        if not words or words[0].startswith("#"):
            continue
        name = words[1].strip() if len(words) > 1 else f"{role} key {number}"
        keys.append(Key(name, _digest(words[0], f"Line {number} of {where}"), role))
    return keys


def _digest(word: str, what: str) -> bytes:
    if word.startswith("sha256:"):
        match = _DIGEST.fullmatch(word)
        if match is None:
            raise ConfigError(
                f"{what} is no SHA-256 digest. Write `sha256:` and 64 hexadecimal digits in lower "
                "case."
            )
        return bytes.fromhex(match.group(1))
    if not _KEY.fullmatch(word):
        raise ConfigError(
            f"{what} is too weak or cannot be sent: a key has 16 to 256 printable ASCII "
            "characters. To make one: openssl rand -hex 32"
        )
    return hashlib.sha256(word.encode()).digest()
