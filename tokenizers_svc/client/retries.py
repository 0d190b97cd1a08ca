"""When to ask again: what may pass by itself, and how long to wait for it.

Every request of the service may be repeated: none changes anything there. A busy or absent service
(429, 502, 503, 504) and a connection that fails may be better in a moment; all else would fail
again. Pauses grow exponentially and are drawn at random, so that clients which were refused
together do not return together; a `Retry-After` is waited for in full, and the random pause comes
on top.
"""

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import httpx

from cache_builder.errors import ConfigError
from tokenizers_svc.client.answers import problem_of
from tokenizers_svc.client.errors import BadAnswerError, ProblemError, ServiceUnavailableError

PASSING = frozenset({429, 502, 503, 504})

T = TypeVar("T")


class Call(NamedTuple):
    """A request to be sent; the answer, or the error of httpx, is sent back into the generator."""

    method: str
    path: str
    query: Mapping[str, str | float | None] = MappingProxyType({})  # None is left out
    accept: str = "application/json"
    body: bytes | None = None
    content_type: str = "application/octet-stream"


class Pause(NamedTuple):
    """Seconds to let pass."""

    seconds: float


Steps = Generator[Call | Pause, Any, T]


@dataclass(frozen=True)
class Retries:
    """How long and how patiently to ask again."""

    total_s: float = 60.0  # after the first try no other begins later; 0: none begins
    first_pause_s: float = 0.1  # the first random pause is at most this, each next twice that
    longest_pause_s: float = 5.0
    random: Random = field(default_factory=Random, repr=False)

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: A time is negative or not a number.
        """
        times = (self.total_s, self.first_pause_s, self.longest_pause_s)
        if not all(seconds >= 0 for seconds in times):
            raise ConfigError(f"Retries wait for times of 0 s or more, not {times}.")

    def pause_s(self, num_tries: int, retry_after_s: float | None) -> float:
        """Return how long to wait after the `num_tries`-th try has failed, seconds."""
        longest = self.first_pause_s * 2.0 ** min(num_tries - 1, 60)
        drawn = self.random.uniform(0.5, 1) * min(longest, self.longest_pause_s)
        return drawn + (retry_after_s or 0)


def exchange(call: Call, retries: Retries) -> Steps[httpx.Response]:
    """Send a request until it is answered or refused for good.

    Raises:
        ProblemError: The service refuses.
        ServiceUnavailableError: It is away or busy for too long.
        BadAnswerError: What answers is no HTTP service that may be asked this.
    """
    started = time.monotonic()
    num_tries = 0
    while True:
        num_tries += 1
        retry_after_s = None
        try:
            answer: httpx.Response = yield call
        except httpx.UnsupportedProtocol as exc:
            raise ConfigError(f"{exc} Pass a URL such as http://127.0.0.1:8000.") from exc
        except httpx.TransportError as exc:
            failure: Exception = exc
            reason = f"does not answer: {str(exc) or type(exc).__name__}"
        except httpx.RequestError as exc:
            raise BadAnswerError(f"The answer to {call.path} cannot be read: {exc}") from exc
        else:
            if answer.is_success:
                return answer
            failure = problem_of(answer)
            if failure.status not in PASSING:
                raise failure
            retry_after_s = retry_after(answer.headers)
            reason = f"is not available: {failure}"
        pause_s = retries.pause_s(num_tries, retry_after_s)
        if time.monotonic() - started + pause_s > retries.total_s:
            raise ServiceUnavailableError(
                f"The service {reason}. {_advice(failure, num_tries, retry_after_s)}"
            ) from failure
        yield Pause(pause_s)


def retry_after(headers: httpx.Headers) -> float | None:
    """Return the seconds that a Retry-After asks for; None where there is none that can be read."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        then = parsedate_to_datetime(text)
    except ValueError:
        return None
    try:
        # By the clock of the server, where it tells: ours may be wrong.
        now_s = parsedate_to_datetime(headers.get("Date", "")).timestamp()
    except ValueError:
        now_s = time.time()
    return max(0.0, then.timestamp() - now_s)


def _advice(failure: Exception, num_tries: int, retry_after_s: float | None) -> str:
    if isinstance(failure, ProblemError) and retry_after_s is not None:
        return f"It asks to come back after {retry_after_s:g} s; tries: {num_tries}."
    return f"See that it runs and that the URL is right; tries: {num_tries}."
