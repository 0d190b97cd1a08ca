"""What a client can be told, one class for each thing that its user can do about it.

PatchCacheError
+-- ProblemError               the service refuses: `code` says why, and asking again is no use
+-- ServiceUnavailableError    it is away or busy, and still was when the retries ended
+-- BadAnswerError             what answers is not this service, or is broken
+-- TokenizerMismatchError     another tokenizer answers than was expected
+-- ImageError                 a picture cannot be read on this side
+-- ConfigError                an argument is wrong; nothing was sent
"""

from cache_builder.errors import PatchCacheError


class ProblemError(PatchCacheError):
    """The service refuses a request, or one picture of it."""

    def __init__(
        self,
        code: str,
        status: int,
        detail: str,
        *,
        limit: float | None = None,
        actual: float | None = None,
        request_id: str | None = None,
    ) -> None:
        """Say why.

        Args:
            code: Kind of problem, such as `corrupt-image`; `http-NNN` where something in between
                answered that is not the service.
            status: Of HTTP.
            detail: What is wrong and what to do.
            limit: The limit that was passed.
            actual: The value that passed it.
            request_id: By which the log of the service names the request.
        """
        super().__init__(f"{detail} ({code})")
        self.code = code
        self.status = status
        self.detail = detail
        self.limit = limit
        self.actual = actual
        self.request_id = request_id


class ServiceUnavailableError(PatchCacheError):
    """The service is away or busy, and still was when the retries ended."""


class BadAnswerError(PatchCacheError):
    """An answer is not what the service promises."""
