"""Many pictures: how they are cut into requests, and what becomes of each.

Pictures are taken in groups of the batch size; a group is loaded, sent and answered as one piece of
work, and only a few groups are held at once. How large a request may be is what the service says.
When it refuses a request as a whole for what may be the fault of one picture, the request is halved
until that picture stands alone, so one bad picture never costs its neighbours their tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, Final, Literal, NamedTuple

import msgpack

from cache_builder.errors import ConfigError, ImageError, PatchCacheError
from tokenizers_svc.client import answers
from tokenizers_svc.client.answers import Item, Tokens
from tokenizers_svc.client.errors import ProblemError
from tokenizers_svc.client.images import Picture, image_bytes
from tokenizers_svc.client.retries import PASSING, Call, Retries, Steps, exchange
from tokenizers_svc.client.steps import Box, check_fingerprint, find_model, tokenize, view_numbers

OnError = Literal["raise", "return"]
Progress = Callable[[int, int | None], None]  # pictures done, and of how many, if that is known

_LARGEST_BATCH = 32
_MAX_CONCURRENCY = 256
_OVERHEAD_BYTES = 200  # of msgpack and a view, per picture
_OF_A_PICTURE: Final = frozenset({413, 415, 422, 500})
_MISSING: Final[Any] = object()


class Plan(NamedTuple):
    """How many pictures are asked for, of whom."""

    model: str
    fingerprint: str
    batch_size: int
    max_bytes: int  # of one request


@dataclass(frozen=True, eq=False)
class Source:
    """A picture that is still where it was, its place among all and the view of it."""

    index: int
    picture: Picture
    view: Box | None


@dataclass(frozen=True, eq=False)
class Loaded:
    """The file of a picture, or why there is none."""

    index: int
    body: bytes | ImageError
    view: list[int] | None


def plan(
    model: str | None,
    batch_size: int | None,
    concurrency: int,
    expect_fingerprint: str | None,
    retries: Retries,
) -> Steps[Plan]:
    """Ask what the service takes, and choose.

    Without a batch size all the requests together are no more than what the service lets in, so
    that this client alone is never told that there are too many.

    Raises:
        ConfigError: A number is out of range, or there is no such model.
        TokenizerMismatchError: The service has another tokenizer than is expected.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"A batch has 1 picture or more, not {batch_size}.")
    if not 1 <= concurrency <= _MAX_CONCURRENCY:
        raise ConfigError(f"The concurrency is 1 to {_MAX_CONCURRENCY}, not {concurrency}.")
    found = yield from find_model(model, retries)
    check_fingerprint(found.fingerprint, expect_fingerprint)
    limits = found.limits
    wanted = batch_size or min(_LARGEST_BATCH, max(1, limits.max_queue // concurrency))
    size = min(wanted, limits.max_items)
    return Plan(found.id, found.fingerprint, size, limits.max_batch_body_bytes)


def groups(
    pictures: Iterable[Picture], views: Iterable[Box | None] | None, batch_size: int
) -> Iterator[list[Source]]:
    """Yield pictures with their views, a batch at a time.

    Raises:
        ConfigError: There are more pictures than views, or fewer.
    """
    sources = (Source(i, *pair) for i, pair in enumerate(_pairs(pictures, views)))
    while group := list(islice(sources, batch_size)):
        yield group


def load(group: Sequence[Source]) -> list[Loaded]:
    """Read the files of a group, and make files of pixels; a picture that has none stays."""
    loaded = []
    for source in group:
        body: bytes | ImageError
        try:
            body = image_bytes(source.picture)
        except ImageError as exc:
            body = exc
        loaded.append(Loaded(source.index, body, view_numbers(source.view)))
    return loaded


def tokenize_group(loaded: Sequence[Loaded], plan: Plan, retries: Retries) -> Steps[list[Item]]:
    """Ask for the tokens of a group, in as many requests as its bytes need."""
    results: dict[int, Tokens | PatchCacheError] = {
        picture.index: picture.body for picture in loaded if isinstance(picture.body, ImageError)
    }
    for request in _requests([p for p in loaded if p.index not in results], plan.max_bytes):
        found = yield from _tokenize_request(request, plan, retries)
        results.update(zip((picture.index for picture in request), found, strict=True))
    return [Item(picture.index, results[picture.index]) for picture in loaded]


@dataclass
class Delivery:
    """The end of the line: what is handed to the caller is checked and counted."""

    plan: Plan
    on_error: OnError
    progress: Progress | None
    total: int | None
    num_done: int = 0

    def check(self, item: Item) -> Item:
        """Return an item, or raise what is wrong with it.

        Raises:
            PatchCacheError: There are no tokens, and the caller wants to be told so.
            TokenizerMismatchError: The service has changed its tokenizer.
        """
        if isinstance(item.result, Tokens):
            check_fingerprint(item.result.fingerprint, self.plan.fingerprint)
        elif self.on_error == "raise":
            item.result.add_note(f"of the picture at index {item.index}")
            raise item.result
        self.num_done += 1
        if self.progress is not None:
            self.progress(self.num_done, self.total)
        return item


def delivery(
    plan: Plan, pictures: Iterable[Picture], on_error: OnError, progress: Progress | None
) -> Delivery:
    """Begin to deliver.

    Raises:
        ConfigError: There is no such way to treat errors.
    """
    if on_error not in ("raise", "return"):
        raise ConfigError(f"on_error is 'raise' or 'return', not {on_error!r}.")
    total = len(pictures) if isinstance(pictures, Sized) else None
    return Delivery(plan, on_error, progress, total)


def _pairs(
    pictures: Iterable[Picture], views: Iterable[Box | None] | None
) -> Iterator[tuple[Picture, Box | None]]:
    if isinstance(pictures, str | bytes | bytearray | memoryview):
        raise ConfigError("One picture alone is for `tokenize`; many are an iterable of them.")
    if views is None:
        yield from ((picture, None) for picture in pictures)
        return
    for picture, view in zip_longest(pictures, views, fillvalue=_MISSING):
        if picture is _MISSING or view is _MISSING:
            raise ConfigError("There is one view for every picture; None is the default one.")
        yield picture, view


def _requests(loaded: Sequence[Loaded], max_bytes: int) -> Iterator[list[Loaded]]:
    """Cut where the bytes of one request would be too many."""
    request: list[Loaded] = []
    num_bytes = 0
    for picture in loaded:
        assert isinstance(picture.body, bytes)
        size = len(picture.body) + _OVERHEAD_BYTES
        if request and num_bytes + size > max_bytes:
            yield request
            request, num_bytes = [], 0
        request.append(picture)
        num_bytes += size
    if request:
        yield request


def _tokenize_request(
    request: Sequence[Loaded], plan: Plan, retries: Retries
) -> Steps[list[Tokens | PatchCacheError]]:
    try:
        return (yield from _ask(request, plan, retries))
    except ProblemError as problem:
        if problem.status not in _OF_A_PICTURE and problem.code != "empty-body":
            raise
        if len(request) == 1:
            return [problem]
    middle = len(request) // 2
    first = yield from _tokenize_request(request[:middle], plan, retries)
    return first + (yield from _tokenize_request(request[middle:], plan, retries))


def _ask(
    request: Sequence[Loaded], plan: Plan, retries: Retries
) -> Steps[list[Tokens | PatchCacheError]]:
    if len(request) == 1:
        (picture,) = request
        assert isinstance(picture.body, bytes)
        return [(yield from tokenize(picture.body, picture.view, plan.model, retries))]
    items = [{"image": picture.body, "view": picture.view} for picture in request]
    call = Call(
        "POST",
        "/v1/tokenize/batch",
        {"model": plan.model, "on_error": "item"},
        answers.TOKENS,
        msgpack.packb({"items": items}),
        answers.MSGPACK,
    )
    answer = yield from exchange(call, retries)
    results: list[Tokens | PatchCacheError] = []
    for picture, result in zip(request, answers.read_batch(answer, len(request)), strict=True):
        if isinstance(result, ProblemError) and result.status in PASSING:
            results += yield from _tokenize_request([picture], plan, retries)
        else:
            results.append(result)
    return results
