"""Every exception of ours: one class for each thing a caller can do about it.

    PatchCacheError              a mistake that a user can mend; the CLI prints it as one line
    +-- ConfigError              an argument or setting is wrong: change the command
    +-- MissingDependencyError   an optional library is not installed: install the extra
    +-- PluginError              an installed tokenizer breaks its promises: tell its author
    +-- SourceError              images cannot be listed or read: mend the source, run again
    |   +-- NotServedError       a server answered that it does not have it: asking again is no use
    +-- ArtifactError            a file on disk is damaged, unfinished or of another version
    |   +-- FormatVersionError   it was written by a newer patchcache: upgrade
    +-- TokenizerMismatchError   two fingerprints differ: tokens of two tokenizers would mix
    +-- ImageError               one image cannot be decoded: the build records it and goes on
    |   +-- ImageTooLargeError   it has more pixels than the limit: shrink it or raise the limit
    +-- WorkerLostError          a process that held part of the work died: run again
    +-- StorageError             an object store does not answer or refuses: mend access, run again
    +-- CacheInUseError          another driver writes the same cache: wait for it
    +-- NotFiniteError           training diverged: the message names the batch

`tokenizers_svc.client.errors` adds those that only a client of the service meets.

Anything else that escapes is a bug of ours and keeps its traceback.
"""


class PatchCacheError(Exception):
    """Base of every error that a user can mend."""

    def __str__(self) -> str:
        """Return the message as one line that a terminal shows as it is.

        It may quote what a damaged or hostile file says.
        """
        return one_line(super().__str__())


class ConfigError(PatchCacheError):
    """An argument, option or setting is wrong."""


class MissingDependencyError(PatchCacheError):
    """An optional library is needed and not installed."""


class PluginError(PatchCacheError):
    """An installed tokenizer does not do what the protocol of plugins says."""


class SourceError(PatchCacheError):
    """Images cannot be listed, named or read."""


class NotServedError(SourceError):
    """A server answered that it does not have something, or does not give it to us."""


class ArtifactError(PatchCacheError):
    """A codebook, cache or checkpoint is damaged, unfinished or not what it claims to be."""


class FormatVersionError(ArtifactError):
    """A file was written by a newer version of patchcache than this one."""


class TokenizerMismatchError(PatchCacheError):
    """Two artifacts come from two different tokenizers."""


class ImageError(PatchCacheError):
    """One image cannot be decoded or tokenised; the message is the reason."""


class ImageTooLargeError(ImageError):
    """One image has more pixels than the limit."""

    def __init__(self, message: str, num_pixels: int | None = None) -> None:
        """Refuse a picture of so many pixels; None where the decoder does not say."""
        super().__init__(message)
        self.num_pixels = num_pixels


class WorkerLostError(PatchCacheError):
    """A worker process died with what it held."""


class StorageError(PatchCacheError):
    """An object store does not answer, or refuses."""


class CacheInUseError(PatchCacheError):
    """Another driver writes the same cache."""


class NotFiniteError(PatchCacheError):
    """Training met a loss or gradient that is not finite."""


def one_line(text: str) -> str:
    """Return a text with escapes for whatever is not printable."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
