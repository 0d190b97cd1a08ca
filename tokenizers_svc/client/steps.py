"""What a client asks, step by step, without doing it.

Every function here that returns `Steps` is a generator of calls and pauses that ends with the
result. Whoever drives it sends the calls over a network and lets the time pass, in a thread or in
an event loop; neither knows what is asked, and nothing is written twice.
"""

import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache_builder.errors import ConfigError, TokenizerMismatchError
from cache_builder.formats.sample import npy_bytes
from cache_builder.formats.views import View
from tokenizers_svc.client import answers
from tokenizers_svc.client.answers import ModelInfo, Reconstruction, Tokens
from tokenizers_svc.client.errors import ProblemError, ServiceUnavailableError
from tokenizers_svc.client.retries import Call, Pause, Retries, Steps, exchange

Box = Sequence[int] | View

_POLL_S = 0.1
_ONCE = Retries(total_s=0)


def connection(url: str, key: str | None, timeout_s: float) -> dict[str, Any]:
    """Return what `httpx.Client` and `httpx.AsyncClient` are made with.

    Raises:
        ConfigError: The URL, the key or the time-out cannot be one.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as exc:
        raise ConfigError(f"{url!r} is not a URL: {exc}.") from exc
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{url!r} is not a URL such as http://127.0.0.1:8000.")
    if parsed.userinfo:
        raise ConfigError("A URL with a password in it would be logged. Pass the key as `key`.")
    if not timeout_s > 0:
        raise ConfigError(f"A time-out is more than 0 s, not {timeout_s}.")
    headers = {}
    if key is not None:
        if not key or not all("!" <= character <= "~" for character in key):
            raise ConfigError("A key is one word of printable ASCII characters; this one is not.")
        headers["Authorization"] = f"Bearer {key}"
    return {
        "base_url": parsed,
        # Redirections are not followed, so http never becomes https; certificates take 20 ms.
        "verify": parsed.scheme == "https",
        "headers": headers,
        "timeout": httpx.Timeout(timeout_s, pool=None),
        "limits": httpx.Limits(max_connections=None),
    }


def request(call: Call) -> dict[str, Any]:
    """Return what `request` of a client of httpx takes."""
    headers = {"Accept": call.accept}
    if call.body is not None:
        headers["Content-Type"] = call.content_type
    return {
        "method": call.method,
        "url": call.path,
        "params": {name: value for name, value in call.query.items() if value is not None},
        "headers": headers,
        "content": call.body,
    }


def list_models(retries: Retries) -> Steps[list[ModelInfo]]:
    """Ask for the tokenizers; the first answers where none is named."""
    return answers.read_models((yield from exchange(Call("GET", "/v1/models"), retries)))


def find_model(name: str | None, retries: Retries) -> Steps[ModelInfo]:
    """Ask for one tokenizer; None is the service's default.

    Raises:
        ConfigError: There is none of that name.
    """
    models = yield from list_models(retries)
    for model in models:
        if name is None or model.id == name:
            return model
    raise ConfigError(
        f"The service has no model {name!r}. It has {', '.join(model.id for model in models)}."
    )


def tokenize(
    body: bytes,
    view: Box | None,
    model: str | None,
    retries: Retries,
    *,
    soft_top_k: int | None = None,
    soft_temperature: float | None = None,
    expect_fingerprint: str | None = None,
) -> Steps[Tokens]:
    """Ask for the tokens of one picture."""
    query = {
        "model": model,
        "view": _view_text(view),
        "soft_top_k": soft_top_k,
        "soft_temperature": soft_temperature,
    }
    call = Call("POST", "/v1/tokenize", query, answers.TOKENS, body)
    tokens = answers.read_tokens((yield from exchange(call, retries)))
    check_fingerprint(tokens.fingerprint, expect_fingerprint)
    return tokens


def tokens_of(
    sha256: str, view: Box | None, model: str | None, retries: Retries
) -> Steps[Tokens | None]:
    """Ask for what was answered before for the file with this SHA-256."""
    query = {"model": model, "view": _view_text(view)}
    call = Call("GET", f"/v1/tokens/{quote(sha256, safe='')}", query, answers.TOKENS)
    try:
        return answers.read_tokens((yield from exchange(call, retries)))
    except ProblemError as problem:
        if problem.code != "not-found":
            raise
        return None


def detokenize(
    token_ids: ArrayLike | Tokens, model: str | None, retries: Retries
) -> Steps[NDArray[np.uint8]]:
    """Ask for the pictures that token ids describe."""
    ids = np.asarray(token_ids.ids if isinstance(token_ids, Tokens) else token_ids)
    if ids.dtype.kind not in "iu" or not ids.size or ids.min() < 0 or ids.max() > 65_535:
        raise ConfigError(
            "Token ids are an array of integers from 0 to 65,535, (rows, cols) or a batch of them; "
            f"this one is {ids.shape} of {ids.dtype}."
        )
    query = {"model": model, "format": "npy"}
    call = Call(
        "POST", "/v1/detokenize", query, answers.NPY, npy_bytes(ids.astype("<u2")), answers.NPY
    )
    return answers.read_pixels((yield from exchange(call, retries)))


def reconstruct(
    body: bytes, view: Box | None, model: str | None, retries: Retries
) -> Steps[Reconstruction]:
    """Ask for a picture as its token ids describe it."""
    query = {"model": model, "view": _view_text(view), "format": "npy"}
    call = Call("POST", "/v1/reconstruct", query, answers.NPY, body)
    return answers.read_reconstruction((yield from exchange(call, retries)))


def codebook(model: str | None, retries: Retries) -> Steps[NDArray[Any]]:
    """Ask for the centroids of a tokenizer."""
    name = (yield from find_model(model, retries)).id
    call = Call("GET", f"/v1/models/{quote(name, safe='')}/codebook.npy", accept=answers.NPY)
    return answers.read_array((yield from exchange(call, retries)))


def wait_ready(timeout_s: float) -> Steps[None]:
    """Ask again and again whether the service is ready.

    Raises:
        ServiceUnavailableError: It is not within `timeout_s`; the message has its last reason.
        ProblemError: Something answers that is not this service.
    """
    started = time.monotonic()
    while True:
        try:
            yield from exchange(Call("GET", "/readyz"), _ONCE)
        except ServiceUnavailableError as exc:
            if time.monotonic() - started >= timeout_s:
                raise ServiceUnavailableError(
                    f"The service is not ready after {timeout_s:g} s: {exc.__cause__}. "
                    "See that it runs and that the URL is right."
                ) from exc
        else:
            return
        yield Pause(_POLL_S)


def check_fingerprint(found: str, expected: str | None) -> None:
    """Refuse tokens of another tokenizer.

    Raises:
        TokenizerMismatchError: The fingerprints differ.
    """
    if expected is not None and found != expected:
        raise TokenizerMismatchError(
            f"The service answers with tokens of {found}, and those of {expected} are expected. "
            "Tokens of two tokenizers do not mix: ask the service that has the other one, or "
            "start again."
        )


def view_numbers(view: Box | None) -> list[int] | None:
    """Return a view as the service takes it: top, left, height, width and 1 if it is mirrored.

    Raises:
        ConfigError: It is no box of whole numbers.
    """
    if view is None:
        return None
    numbers = list(view)
    if len(numbers) not in (4, 5) or not all(
        isinstance(number, int | np.integer) for number in numbers
    ):
        raise ConfigError(
            "A view is (top, left, height, width) in whole pixels and, if you like, whether it is "
            f"mirrored, not {view!r}."
        )
    return [int(number) for number in numbers]


def _view_text(view: Box | None) -> str | None:
    numbers = view_numbers(view)
    return None if numbers is None else ",".join(map(str, numbers))
