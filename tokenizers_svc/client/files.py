"""`patchcache tokenize`: images of any source to a file of token ids, by way of a service.

Every image that is tokenised is a line of a journal at once, with its name, the tokenizer's
fingerprint and its ids. A `.jsonl` is that journal; an array is made of it at the end. So the same
command continues where it was stopped, and asks again only for what is missing. An image that
cannot be tokenised is reported and holds up no other.
"""

import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_builder.errors import (
    ArtifactError,
    ConfigError,
    ImageError,
    SourceError,
    TokenizerMismatchError,
)
from cache_builder.files import publish
from cache_builder.formats.plan import PlanUnit
from cache_builder.reporting import Progress
from cache_builder.sources import Listing, Source, open_source
from cache_builder.sources.names import is_image
from tokenizers_svc.client.answers import Tokens
from tokenizers_svc.client.images import Picture
from tokenizers_svc.client.synchronous import TokenizerClient

ABSENT = 65_535  # in place of the ids of an image that has none; no codebook has so many centroids

_FORMATS = (".jsonl", ".npz", ".npy")
_UNTIL_READY_S = 10.0


@dataclass(frozen=True)
class TokenizeOptions:
    """What to tokenise, by whom, and where the ids go."""

    images: tuple[str, ...]  # files, folders, archives, lists
    url: str
    out: Path | None = None  # None: lines on standard output
    key_file: Path | None = None
    model: str | None = None
    batch_size: int | None = None
    concurrency: int = 4


@dataclass
class Summary:
    """What came of it."""

    num_images: int = 0
    num_kept: int = 0  # of an earlier run
    failures: list[tuple[str, str]] = field(default_factory=list)  # name and reason

    @property
    def num_tokenised(self) -> int:
        """Images whose ids were asked for in this run and are there."""
        return self.num_images - self.num_kept - len(self.failures)


class _Place(NamedTuple):
    """Where images are: a source, or one file, which has none."""

    location: str
    source: Source | None = None
    listing: Listing | None = None

    def units(self) -> Iterator[tuple[PlanUnit | None, list[str]]]:
        """Yield the units of the source, made anew by every call, with the names of the images."""
        if self.listing is None:
            yield None, [self.location]
            return
        is_list = self.listing.info.kind == "list"  # whose rows are paths and URLs themselves
        for unit in self.listing.units:
            prefix = "" if is_list else f"{unit.container or self.location.rstrip('/')}/"
            yield unit, [prefix + row.source for row in unit.rows]


def run(options: TokenizeOptions, progress: Progress) -> Summary:
    """Tokenise.

    Args:
        options: What to do.
        progress: Called with the number of images done, and of all that are to be done.

    Raises:
        ConfigError: An option is wrong.
        SourceError: There are no images, or a source cannot be read.
        ArtifactError: The file at `out` is none of ours.
        TokenizerMismatchError: It holds tokens of another tokenizer than the service has.
        PatchCacheError: The service refuses or is away.
    """
    if options.out and options.out.suffix not in _FORMATS:
        raise ConfigError(f"--out ends in {', '.join(_FORMATS)}, not {options.out.name!r}.")
    key = _read_key(options.key_file) if options.key_file else None
    with TokenizerClient(options.url, key=key, model=options.model) as client:
        client.wait_ready(_UNTIL_READY_S)
        places = list(_places(options.images))
        units = (names for place in places for _, names in place.units())
        names = list(dict.fromkeys(chain.from_iterable(units)))
        if options.out is None:
            return _tokenize(client, places, names, _Journal(sys.stdout), options, progress)
        path = _journal_path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            summary = _tokenize(client, places, names, _Journal(file, path), options, progress)
    if path != options.out:
        _publish_array(options.out, path, names, is_whole=not summary.failures)
    return summary


def _read_key(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except UnicodeDecodeError:
        raise ConfigError(
            f"{path} is not UTF-8 text. Pass a file that holds the key and nothing else."
        ) from None


class _Line(NamedTuple):
    """One image of a journal."""

    num_bytes: int
    image: str
    model: str
    fingerprint: str
    ids: NDArray[np.uint16]


class _Journal:
    """Lines of tokens; those of an earlier run are read first, and one that was cut off dropped."""

    def __init__(self, file: IO[str], path: Path | None = None) -> None:
        self._file = file
        self.path = path
        self.names: set[str] = set()
        self.fingerprint: str | None = None
        if path is None:
            return
        size = 0
        for line in _read_journal(path):
            size += line.num_bytes
            self.names.add(line.image)
            self.fingerprint = line.fingerprint
        file.truncate(size)

    def add(self, name: str, tokens: Tokens) -> None:
        fields = {
            "image": name,
            "model": tokens.model,
            "fingerprint": tokens.fingerprint,
            "shape": tokens.ids.shape,
            "token_ids": tokens.ids.ravel().tolist(),
        }
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()


def _read_journal(path: Path) -> Iterator[_Line]:
    """Yield every whole line.

    Raises:
        ArtifactError: A line is not one of ours.
    """
    with path.open("rb") as file:
        for text in file:
            if not text.endswith(b"\n"):
                return  # the run was killed while it wrote
            try:
                fields = json.loads(text)
                ids = np.array(fields["token_ids"], np.uint16).reshape(fields["shape"])
                image, model, fingerprint = (
                    str(fields[name]) for name in ("image", "model", "fingerprint")
                )
                yield _Line(len(text), image, model, fingerprint, ids)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
                raise ArtifactError(
                    f"{path} is not what `patchcache tokenize` writes. Pass another --out."
                ) from exc


def _tokenize(
    client: TokenizerClient,
    places: list[_Place],
    names: list[str],
    journal: _Journal,
    options: TokenizeOptions,
    progress: Progress,
) -> Summary:
    wanted = set(names) - journal.names
    summary = Summary(num_images=len(names), num_kept=len(names) - len(wanted))
    total = len(wanted)
    on_their_way: dict[int, str] = {}

    def pictures() -> Iterator[Picture]:
        num_sent = 0
        for name, picture in _read(places, wanted):
            if isinstance(picture, ImageError):
                summary.failures.append((name, str(picture)))
                continue
            on_their_way[num_sent] = name
            num_sent += 1
            yield picture

    items = client.tokenize_many(
        pictures(),
        batch_size=options.batch_size,
        concurrency=options.concurrency,
        on_error="return",
        expect_fingerprint=journal.fingerprint,
    )
    num_done = 0
    try:
        for item in items:
            name = on_their_way.pop(item.index)
            if item.error is None:
                journal.add(name, item.tokens)
                num_done += 1
            else:
                reason = str(item.error).removeprefix(f"{name} ")
                summary.failures.append((name, reason))
            progress(num_done + len(summary.failures), total)
    except TokenizerMismatchError as exc:
        if journal.path is None:
            raise
        raise TokenizerMismatchError(f"{journal.path} cannot be continued. {exc}") from exc
    return summary


def _places(locations: Iterable[str]) -> Iterator[_Place]:
    for location in locations:
        if is_image(location) and not Path(location).is_dir():
            yield _Place(location)
            continue
        source = open_source(location)
        listing = source.scan(None)
        if not listing.info.num_samples:
            raise SourceError(f"{location} holds no images.")
        yield _Place(location, source, listing)


def _read(places: Iterable[_Place], wanted: set[str]) -> Iterator[tuple[str, Picture | ImageError]]:
    """Yield the images that are wanted, each once, or why one is refused."""
    wanted = set(wanted)
    for place in places:
        for unit, names in place.units():
            chosen = [i for i, name in enumerate(names) if name in wanted]
            wanted.difference_update(names)
            if unit is None or place.source is None:
                yield from ((names[i], names[i]) for i in chosen)
            elif chosen:
                part = unit.model_copy(update={"rows": [unit.rows[i] for i in chosen]})
                for i, (_, image) in zip(chosen, place.source.read(part), strict=True):
                    yield names[i], image


def _journal_path(out: Path) -> Path:
    return out if out.suffix == ".jsonl" else out.with_name(f"{out.name}.part.jsonl")


def _publish_array(out: Path, journal: Path, names: list[str], *, is_whole: bool) -> None:
    """Make an array of a journal, in the order of `names`; a whole one needs no journal more."""
    rows = {name: row for row, name in enumerate(names)}
    ids, first = np.empty(0, np.uint16), None
    for line in _read_journal(journal):
        if line.image not in rows:
            continue
        if first is None:
            first = line
            ids = np.full((len(names), *line.ids.shape), ABSENT, np.uint16)
        ids[rows[line.image]] = line.ids
    if first is None:
        return
    buffer = io.BytesIO()
    if out.suffix == ".npy":
        np.save(buffer, ids)
    else:
        np.savez_compressed(
            buffer,
            token_ids=ids,
            images=np.array(names),
            model=np.array(first.model),
            fingerprint=np.array(first.fingerprint),
        )
    publish(out, buffer.getvalue())
    if is_whole:
        journal.unlink()
