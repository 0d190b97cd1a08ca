"""What patchcache reads from disk: for each format a whole one, its reader, and its answer.

A reader's answer is turned into plain values that `==` compares. Of a damaged file it must be the
answer of the whole one, or an error of ours. Three exceptions are named here, format by format:
what only `verify` is meant to notice (`told_by`), what is a valid file of another content because
nothing digests it (`is_open`), and files whose own checksum was forged.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz import artifacts, mutators
from tests.fuzz.artifacts import golden, verify_tells
from tests.fuzz.mutators import Mutator

_JSON = (mutators.json_value, mutators.json_value, mutators.digits, mutators.deep_json)
_BINARY = (mutators.number,)
_MUTATORS: dict[str, Sequence[Mutator]] = {
    ".json": _JSON,
    ".jsonl": (mutators.json_line, mutators.lines, mutators.digits, mutators.deep_json),
    ".safetensors": (mutators.safetensors_header, mutators.digits, *_BINARY),
    ".tar": (
        mutators.tar_header,
        mutators.tar_order,
        mutators.npy_header,
        mutators.digits,
        *_BINARY,
    ),
    ".pt": (mutators.zip_header, mutators.zip_member, *_BINARY),
    ".pth": (mutators.zip_header, mutators.zip_member, *_BINARY),
    ".zip": (mutators.zip_header, mutators.zip_member, *_BINARY),
    ".npy": (mutators.npy_header, *_BINARY),
    ".toml": (mutators.lines, mutators.digits),
    ".txt": (mutators.lines, mutators.digits),
}


class Format(NamedTuple):
    """One kind of artifact."""

    name: str
    make: Callable[[Path], object]  # writes a whole one into an empty folder
    read: Callable[[Path], Any]
    damaged: Sequence[str]  # glob patterns of the files to damage, in order of weight
    share: int  # of the inputs, beside the others
    told_by: Callable[[Path], bool] | None = None  # what notices another answer, if not the reader
    is_open: bool = False  # another valid content is another answer: no digest covers it
    is_named: bool = True  # a message names the file; of a recipe and of imported rows the key

    def files(self, folder: Path) -> list[Path]:
        """Return the files to damage."""
        found = (path for pattern in self.damaged for path in sorted(folder.glob(pattern)))
        return [path for path in found if path.is_file()]


def mutators_of(path: Path) -> Sequence[Mutator]:
    """Return what damages a file by its structure."""
    return _MUTATORS.get(path.suffix, _BINARY)


def _cache(name: str, made_of: str, damaged: Sequence[str], share: int) -> Format:
    return Format(name, golden(made_of), artifacts.read_cache, damaged, share, told_by=verify_tells)


def _zarr(name: str, damaged: str, share: int) -> Format:
    def read(folder: Path) -> Any:
        return artifacts.read_cache(folder / "cache")

    return Format(name, artifacts.make_zarr, read, (damaged,), share, told_by=verify_tells)


def _source(suffix: str) -> Format:
    def make(folder: Path) -> None:
        artifacts.make_source(folder, suffix)

    def read(folder: Path) -> Any:
        return artifacts.read_source(folder, suffix)

    return Format(f"source: {suffix}", make, read, (f"images.{suffix}",), 4, is_open=True)


_SAFETENSORS = ("*.safetensors",)
_CHECKPOINTS = ("checkpoints/*.pt",)
_CHUNKS = "tokens.zarr/**/c/**/*"

_ALL = (
    Format(
        "codebook: pixels", golden("codebook.safetensors"), artifacts.read_codebook,
        _SAFETENSORS, 8,
    ),
    Format(
        "codebook: features", golden("payloads/codebook.safetensors"), artifacts.read_codebook,
        _SAFETENSORS, 6,
    ),
    _cache("manifest and plan", "webdataset", ("manifest.json", "plan.json"), 14),
    _cache("commit records", "webdataset", ("units/*.json",), 8),
    _cache("shards", "webdataset", ("shards/*.tar",), 10),
    _cache("shards with payloads", "payloads/webdataset", ("shards/*.tar", "units/*"), 8),
    Format(
        "shards without records", golden("webdataset"), artifacts.read_tar,
        ("shards/000000.tar",), 8, is_open=True,
    ),
    _zarr("Zarr: manifest", "cache/manifest.json", 3),
    _zarr("Zarr: metadata", "cache/tokens.zarr/**/zarr.json", 5),
    _zarr("Zarr: chunks", f"cache/{_CHUNKS}", 5),
    _cache("Zarr: payloads", "payloads/zarr", (_CHUNKS,), 4),
    Format(
        "layers", artifacts.make_layers, artifacts.read_layer,
        ("cache/targets/**/*", "cache/manifest.json"), 5, told_by=verify_tells,
    ),
    Format(
        "batches of the trainer", golden("webdataset"), artifacts.read_batches, ("shards/*.tar",),
        5, told_by=verify_tells,
    ),
    Format(
        "plans joined to images", artifacts.make_imageless, artifacts.read_imageless,
        ("cache/plan/*.json",), 4, told_by=verify_tells,
    ),
    Format("verify", golden("webdataset"), artifacts.read_by_verify, ("*", "*/*"), 3),
    Format("verify: Zarr", artifacts.make_zarr, artifacts.read_by_verify, ("cache/**/*",), 1),
    Format("verify: layers", artifacts.make_layers, artifacts.read_by_verify, ("cache/**/*",), 1),
    Format(
        "checkpoint", artifacts.make_run, artifacts.read_checkpoint, ("checkpoints/*2.pt",), 8
    ),
    Format(
        "newest checkpoint", artifacts.make_run, artifacts.read_run, _CHECKPOINTS, 2, is_open=True
    ),
    Format(
        "checkpoint of fine-tuning", artifacts.make_finetuned, artifacts.read_finetuned,
        _CHECKPOINTS, 4,
    ),
    Format(
        "exported model", artifacts.make_export, artifacts.read_export, _SAFETENSORS, 4,
        is_open=True,
    ),
    Format(
        "training log", artifacts.make_run, artifacts.read_training_log, ("log.jsonl",), 2,
        is_open=True,
    ),
    Format(
        "recipe", artifacts.make_recipe, artifacts.read_recipe, ("*.toml",), 3, is_open=True,
        is_named=False,
    ),
    Format(
        "imported tokens", artifacts.make_tokens, artifacts.read_tokens, ("*",), 6, is_open=True,
        is_named=False,
    ),
    Format(
        "journal of tokens", artifacts.make_journal, artifacts.read_journal, ("*.jsonl",), 2,
        is_open=True,
    ),
    Format("sample of a fit", artifacts.make_samples, artifacts.read_samples, ("store/*",), 3),
    Format(
        "keys of the service", artifacts.make_keys, artifacts.read_keys, ("*.txt",), 2,
        is_open=True,
    ),
    Format("log of builds", artifacts.make_log, artifacts.read_log, ("*.jsonl",), 1, is_open=True),
    _source("tar"),
    _source("zip"),
    _source("parquet"),
)  # fmt: skip
FORMATS = {each.name: each for each in _ALL}
