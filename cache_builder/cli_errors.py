"""How a command ends when it cannot go on: one line that says what, and an exit status."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cache_builder.errors import PatchCacheError

_ALLOCATION_FAILED = "can't allocate memory"

_STOPPED = (130, 143)  # what typer makes of a KeyboardInterrupt, and `ray_cluster` of SIGTERM
_GOES_ON = "stopped; the same command continues"

_EXTRA_OF_COMMAND = {
    "fit": "build", "build": "build", "verify": "build", "inspect": "build", "adopt": "tokens",
    "convert": "build", "merge": "build", "subset": "build", "import": "build",
    "push": "hub", "pull": "hub",
    "serve": "serve", "tokenize": "client", "train": "train", "probe": "train", "finetune": "train",
    "export": "train",
}  # fmt: skip


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print what a user can mend as one line on stderr, and exit."""
    try:
        yield
    except PatchCacheError as exc:
        print(f"patchcache {_command()}: {exc}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as exc:
        extra = _EXTRA_OF_COMMAND.get(_command(), "all")
        print(
            f"patchcache needs '{exc.name}', which is not installed. "
            f"Run: pip install 'patchcache[{extra}]'",
            file=sys.stderr,
        )
        sys.exit(1)
    except OSError as exc:
        # A full disk, a missing permission: nothing that is on disk is damaged by it.
        where = f": {exc.filename}" if exc.filename else ""
        print(
            f"patchcache: {exc.strerror or exc}{where}. Mend that and run the same command again; "
            "what was finished is kept.",
            file=sys.stderr,
        )
        sys.exit(1)
    except (MemoryError, RuntimeError) as exc:
        # torch reports that the CPU is out of memory as a plain RuntimeError.
        if not isinstance(exc, MemoryError) and _ALLOCATION_FAILED not in str(exc):
            raise
        print(
            f"patchcache: out of memory ({_last_line(exc)}). Use fewer --workers, a smaller -k or "
            "--sample, or a machine with more memory; what was finished is kept.",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:  # before typer has begun, which would end with this status
        print(_GOES_ON, file=sys.stderr)
        sys.exit(_STOPPED[0])
    except SystemExit as exc:
        if exc.code in _STOPPED:
            print(_GOES_ON, file=sys.stderr)
        raise


def _command() -> str:
    return next((word for word in sys.argv[1:] if not word.startswith("-")), "")


def _last_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[-1]
