"""One folder of a repository on the Hugging Face Hub. The only `import huggingface_hub` of ours.

Requests that fail for a moment (no connection, 408, 429, 5xx) are made again after growing pauses.
Everything else is a `StorageError` of one line. The library finds the token in the environment
(HF_TOKEN) or where `hf auth login` left it, and the server in HF_ENDPOINT; neither is ever logged.
"""

import contextlib
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, cast

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from cache_builder.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

RepoType = Literal["dataset", "model"]

_R = TypeVar("_R")

_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
_MAX_SHOWN = 300  # characters of a reason
# The base of its HTTP errors is that of its HTTP library, which differs between its versions.
_HTTP_FAILURE = cast(type[Exception], HfHubHTTPError.__mro__[1])
_FAILURES = (_HTTP_FAILURE, OSError, RuntimeError, ValueError)
_PLACE = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")


class RemoteFile(NamedTuple):
    """A file as the Hub lists it."""

    bytes: int
    sha256: str | None  # of large files alone
    blob: str  # git's SHA-1 of the others


class HubFolder:
    """A folder of a repository at one revision."""

    def __init__(
        self,
        place: str,
        *,
        repo_type: RepoType = "dataset",
        revision: str = "main",
        endpoint: str | None = None,
        pauses_s: tuple[float, ...] = _PAUSES_S,
    ) -> None:
        """Say where it is; nothing is asked of the Hub yet.

        Args:
            place: USER/REPO or USER/REPO/FOLDER.
            repo_type: Of the repository.
            revision: Branch, tag or commit.
            endpoint: Address of the Hub; None is that of HF_ENDPOINT, or huggingface.co.
            pauses_s: Between one try and the next, seconds.

        Raises:
            ConfigError: `place` is none.
        """
        if not _PLACE.fullmatch(place) or any(set(part) == {"."} for part in place.split("/")):
            raise ConfigError(
                f"{place!r} is not a place on the Hub. Write USER/REPO or USER/REPO/FOLDER."
            )
        user, repo, *folder = place.split("/")
        self.repo = f"{user}/{repo}"
        self.folder = "/".join(folder)
        self.place = place
        self.revision = revision
        self._type: RepoType = repo_type
        self._pauses_s = pauses_s
        self._endpoint = endpoint
        self._api = HfApi(endpoint=endpoint)
        disable_progress_bars()  # a command has its own

    @property
    def options(self) -> str:
        """What a command must say besides the place, each option after a space; often nothing."""
        repo_type = "" if self._type == "dataset" else f" --repo-type {self._type}"
        revision = "" if self.revision == "main" else f" --revision {self.revision}"
        return repo_type + revision

    def create(self, *, private: bool) -> None:
        """Make the repository, unless it is there.

        Raises:
            StorageError: The Hub refuses or does not answer.
        """
        self._ask(
            "be created",
            lambda: self._api.create_repo(
                self.repo, repo_type=self._type, private=private, exist_ok=True
            ),
        )

    def commit_id(self) -> str:
        """Return the commit that the revision stands for now.

        Raises:
            StorageError: There is no such repository or revision, or the Hub does not answer.
        """
        info = self._ask(
            "be read",
            lambda: self._api.repo_info(self.repo, repo_type=self._type, revision=self.revision),
        )
        return str(info.sha)

    def files(self, revision: str | None = None) -> dict[str, RemoteFile]:
        """Return the files of the folder by their names within it.

        Raises:
            StorageError: There is no such repository or revision, or the Hub does not answer.
        """
        return self._ask("be listed", lambda: dict(self._list(revision or self.revision)))

    def send(self, files: Mapping[str, Path | bytes], message: str) -> None:
        """Commit files, by their names within the folder.

        Raises:
            StorageError: The Hub refuses or does not answer.
        """

        def commit() -> None:
            # An operation that has been committed cannot be used for another try.
            operations = [
                CommitOperationAdd(
                    self._full(name), str(content) if isinstance(content, Path) else content
                )
                for name, content in files.items()
            ]
            self._api.create_commit(
                self.repo,
                operations,
                commit_message=message,
                repo_type=self._type,
                revision=self.revision,
            )

        self._ask("be written to", commit)

    def fetch(self, name: str, commit: str, into: Path) -> Path:
        """Download one file below a folder, where it appears whole; return its path.

        Raises:
            StorageError: There is no such file, or the Hub does not answer.
        """
        full = self._full(name)

        def download() -> str:
            found = hf_hub_download(
                self.repo,
                full,
                repo_type=self._type,
                revision=commit,
                local_dir=into,
                endpoint=self._endpoint,
            )
            return str(found)

        return Path(self._ask(f"give {full}", download))

    def read(self, name: str) -> bytes:
        """Return the content of a small file at the revision.

        Raises:
            StorageError: There is no such file, or the Hub does not answer.
        """
        with tempfile.TemporaryDirectory() as folder:
            return self.fetch(name, self.revision, Path(folder)).read_bytes()

    def _list(self, revision: str) -> Iterator[tuple[str, RemoteFile]]:
        prefix = f"{self.folder}/" if self.folder else ""
        entries = self._api.list_repo_tree(
            self.repo,
            self.folder or None,
            recursive=True,
            revision=revision,
            repo_type=self._type,
        )
        # The Hub says that an empty folder is not there.
        with contextlib.suppress(EntryNotFoundError):
            for entry in entries:
                if isinstance(entry, RepoFile):
                    sha256 = entry.lfs.sha256 if entry.lfs else None
                    found = RemoteFile(entry.size, sha256, entry.blob_id)
                    yield entry.path.removeprefix(prefix), found

    def _full(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def _ask(self, what: str, request: Callable[[], _R]) -> _R:
        """Make a request, again if it fails for a moment; `what` ends '... cannot'."""
        for pause_s in (*self._pauses_s, None):
            try:
                return request()
            except (RepositoryNotFoundError, RevisionNotFoundError) as exc:
                raise StorageError(
                    f"There is no {self._type} {self.repo} with a revision {self.revision!r} on "
                    "the Hub, or the token in HF_TOKEN may not see it."
                ) from exc
            except HFValidationError as exc:
                raise ConfigError(f"{self.place}: {_first_line(exc)}") from exc
            except _FAILURES as exc:
                failure = _cause(exc)
                if pause_s is None or not _is_passing(failure):
                    raise StorageError(
                        f"{self.place} on the Hub cannot {what}: {_first_line(failure)}. "
                        "Mend that and run the same command again; what has arrived is kept."
                    ) from exc
                logger.warning(
                    "%s cannot %s (%s); trying again in %g s",
                    self.place, what, _first_line(failure), pause_s,
                )  # fmt: skip
                time.sleep(pause_s)
        raise AssertionError


def _cause(exc: BaseException) -> BaseException:
    """Return what went wrong underneath an error of the library's uploads or downloads."""
    while not isinstance(exc, HfHubHTTPError) and isinstance(exc.__cause__, _FAILURES):
        exc = exc.__cause__
    return exc


def _is_passing(exc: BaseException) -> bool:
    """Say whether the same request may succeed later."""
    if isinstance(exc, HfHubHTTPError):
        status = exc.response.status_code
        return status in (408, 429) or status >= 500
    return isinstance(exc, (_HTTP_FAILURE, ConnectionError, TimeoutError))


def _first_line(exc: BaseException) -> str:
    lines = [line for line in str(exc).splitlines() if line.strip()]
    return (lines[0].rstrip(".") if lines else type(exc).__name__)[:_MAX_SHOWN]
