"""The models of a service: a name, a codebook and the batcher of its tokenizer each.

Codebooks that quantise the same features share one feature model: it is loaded once for all of
them, and goes when the last of them goes.
"""

import asyncio
import json
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch

from cache_builder.errors import ConfigError
from cache_builder.formats.codebook import Codebook
from cache_builder.tokenizers.features import FeatureExtractor, load_extractor
from cache_builder.tokenizers.tokenizer import PatchTokenizer, choose_device
from tokenizers_svc.batch_reports import BatchReport
from tokenizers_svc.batcher import Batcher
from tokenizers_svc.encoding import Tokenizer
from tokenizers_svc.limits import Limits
from tokenizers_svc.options import check_name
from tokenizers_svc.pending import Crew
from tokenizers_svc.problems import ProblemError


class Extractors:
    """Feature models by what they compute; each is loaded once, however many ask for it."""

    def __init__(self) -> None:
        """Hold none."""
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[str, FeatureExtractor] = (
            weakref.WeakValueDictionary()
        )

    def load(self, codebook: Codebook, device: torch.device, weights: str | None) -> PatchTokenizer:
        """Return the tokenizer of a codebook, over a feature model that others may use too.

        Raises:
            ConfigError: The feature model cannot be loaded.
            TokenizerMismatchError: The weights are not those that the codebook was fitted with.
        """
        spec, rule = codebook.extractor, codebook.pixel_rule
        identity = [spec.identity(), rule.model_dump(mode="json"), str(device)]
        key = json.dumps(identity, sort_keys=True)
        with self._lock:
            extractor = self._known.get(key)
            if extractor is None:
                extractor = load_extractor(spec, rule, device, weights, codebook.plugin)
                self._known[key] = extractor
        return PatchTokenizer(codebook, extractor, device)


class Source(NamedTuple):
    """Where a model comes from; a model without a path cannot be loaded again."""

    codebook: Codebook
    device: torch.device
    load: Callable[[], Tokenizer]
    load_decoder: Callable[[], PatchTokenizer]  # on the CPU
    path: str | None = None


class CodebookFile(NamedTuple):
    """A file of a model's codebook, and the tag that names its content."""

    parts: tuple[bytes | memoryview, ...]
    etag: str


OnBatch = Callable[[str, BatchReport], None]


class Served:
    """One model at work."""

    def __init__(
        self,
        name: str,
        source: Source,
        limits: Limits,
        on_batch: OnBatch | None,
    ) -> None:
        """Prepare; `start` begins. The limits are resolved for this machine."""
        self.name = name
        self.source = source
        self.codebook = source.codebook
        self.batcher = Batcher(
            source.load,
            max_batch=limits.max_batch,
            linger_s=limits.linger_s or 0.0,
            crew=Crew.for_device(
                source.device, num_lanes=limits.lanes, num_decoders=limits.decode_threads
            ),
            name=f"tokenizer {name}",
            on_batch=partial(on_batch, name) if on_batch else None,
        )
        self.files: dict[str, CodebookFile] = {}  # those that have been asked for
        self._num_users = 0
        self._is_unused = asyncio.Event()
        self._is_unused.set()

    @property
    def fingerprint(self) -> str:
        """Identity of the tokenizer, SHA-256 in hexadecimal."""
        return self.codebook.fingerprint

    @property
    def device(self) -> torch.device:
        """Where the tokenizer runs."""
        return self.source.device

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of one picture's ids: (rows, cols), or (rows, cols, M) with M > 1 stages."""
        return self.codebook.ids_shape

    @cached_property
    def decoder(self) -> PatchTokenizer:
        """The tokenizer that turns ids back into pictures, on the CPU, where it can."""
        return self.source.load_decoder()

    def hold(self) -> None:
        """Keep the model from being closed by a reload."""
        self._num_users += 1
        self._is_unused.clear()

    def release(self) -> None:
        """Take back one `hold`."""
        self._num_users -= 1
        if not self._num_users:
            self._is_unused.set()

    async def unused(self) -> None:
        """Wait until nobody uses the model."""
        await self._is_unused.wait()


class Registry:
    """The models of one service by name; the first is the default."""

    def __init__(
        self,
        codebooks: Mapping[str, str | Path | Tokenizer],
        *,
        device: str,
        weights: str | None,
        limits: Limits,
        num_cores: int,
        on_batch: OnBatch | None = None,
    ) -> None:
        """Read the codebooks; the tokenizers are loaded by `start`.

        Args:
            codebooks: Name to the path of a codebook, or to a loaded tokenizer.
            device: Of codebooks given as paths.
            weights: Weights file of their feature models, if not where the codebook says.
            limits: As asked for; `limits` has them resolved for the device.
            num_cores: Cores of this process.
            on_batch: Called with a model's name after every batch, in the thread that ran it.

        Raises:
            ArtifactError: A codebook is missing or damaged.
            ConfigError: There is no codebook, no such device, or a name that no URL can hold.
        """
        if not codebooks:
            raise ConfigError("A service needs a codebook. Pass one: --codebook PATH")
        self._extractors = Extractors()
        self._device, self._weights = device, weights
        self._on_batch = on_batch
        sources = {check_name(name): self.open(codebook) for name, codebook in codebooks.items()}
        on_cpu = all(source.device.type == "cpu" for source in sources.values())
        self.limits = limits.resolved(on_cpu=on_cpu, num_cores=num_cores)
        self._served = {name: self.prepare(name, source) for name, source in sources.items()}

    def open(self, codebook: str | Path | Tokenizer) -> Source:
        """Read a codebook, or take a loaded tokenizer as it is."""
        if not isinstance(codebook, str | Path):
            decoder = partial(PatchTokenizer.load, codebook.codebook, "cpu")
            return Source(codebook.codebook, codebook.device, partial(_the_same, codebook), decoder)
        read, device = Codebook.load(codebook), choose_device(self._device)
        load = partial(self._extractors.load, read, device, self._weights)
        decoder = partial(self._extractors.load, read, torch.device("cpu"), self._weights)
        return Source(read, device, load, decoder, str(codebook))

    def prepare(self, name: str, source: Source) -> Served:
        """Return a model that has not started."""
        return Served(name, source, self.limits, self._on_batch)

    def __iter__(self) -> Iterator[Served]:
        """Go through the models, the default one first."""
        return iter(self._served.values())

    @property
    def default(self) -> Served:
        """The model of requests that name none."""
        return next(iter(self._served.values()))

    def get(self, name: str | None) -> Served:
        """Return the model of a name, the default one for None.

        Raises:
            ProblemError: 404.
        """
        served = self.default if name is None else self._served.get(name)
        if served is None:
            raise ProblemError(
                "model-not-found", "There is no model of this name; /v1/models lists those here."
            )
        return served

    def replace(self, served: Served) -> None:
        """Let a model that is ready answer in the place of the one of its name."""
        self._served[served.name] = served

    def start(self) -> None:
        """Begin loading all tokenizers; returns at once."""
        for served in self:
            served.batcher.start()

    async def close(self) -> None:
        """Answer what was let in, then end the threads."""
        await asyncio.gather(*(served.batcher.close() for served in self))


def name_models(
    codebooks: str | Path | Tokenizer | Mapping[str, str | Path | Tokenizer], model: str | None
) -> Mapping[str, str | Path | Tokenizer]:
    """Return name to codebook; one without a name is called by its file or its fingerprint."""
    if isinstance(codebooks, Mapping):
        if model is not None:
            raise ConfigError("`model` names one codebook; several bring their names themselves.")
        return codebooks
    if isinstance(codebooks, str | Path):
        return {model or Path(codebooks).stem: codebooks}
    return {model or codebooks.codebook.fingerprint[:12]: codebooks}


def failures(models: Sequence[Served]) -> Iterator[BaseException]:
    """Give what ended tokenizers for good."""
    for served in models:
        if served.batcher.failure is not None:
            yield served.batcher.failure


def _the_same(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer
