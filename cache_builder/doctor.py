"""`patchcache doctor`: what is installed, whether it works, and what this machine is like.

A finding is `ok`, `absent` (not installed, and nobody asked for it), `weak` (it works, and could do
better) or `broken`. Only what is broken fails the command: a base requirement or one of an extra
that was demanded, or a library that is installed and does not work. Whatever is not `ok` says what
to do.

Compiled libraries are tried in processes of their own (`doctor_probes`): a broken one may kill its
process or hang it.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, entry_points
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import JsonValue

from cache_builder import __version__, doctor_probes, requirements
from cache_builder.errors import ConfigError
from cache_builder.measures import size_text

State = Literal["ok", "absent", "weak", "broken"]

_FREE_BYTES = 5_000_000_000  # a build of a small set, and the sample of its codebook
_FREE_SHARED_BYTES = 1_000_000_000  # loaders of the trainer and Ray hand over pixels there
_OPEN_FILES = 4096
_SHARED = Path("/dev/shm")


class Finding(NamedTuple):
    """One line of the report."""

    group: str  # what it is about, in a word or two
    name: str
    state: State
    value: str
    hint: str = ""  # what to do; empty where all is well


class Report(NamedTuple):
    """What was found."""

    findings: tuple[Finding, ...]

    @property
    def is_well(self) -> bool:
        """Whether nothing is broken."""
        return all(finding.state != "broken" for finding in self.findings)

    def result(self) -> dict[str, JsonValue]:
        """Return the report for a script."""
        return {
            "version": __version__,
            "is_well": self.is_well,
            "findings": [dict(finding._asdict()) for finding in self.findings],
        }

    def lines(self) -> Iterator[str]:
        """Yield the report for a person; hints stand below what they are about."""
        width = max(len(finding.name) for finding in self.findings)
        group = ""
        for finding in self.findings:
            if finding.group != group:
                group = finding.group
                yield group
            yield f"  {finding.state:<6} {finding.name:<{width}}  {finding.value}".rstrip()
            if finding.hint:
                yield f"  {'':<6} {'':<{width}}  -> {finding.hint}"
        counts = {
            state: sum(finding.state == state for finding in self.findings)
            for state in ("broken", "weak", "absent")
        }
        yield ", ".join(f"{number} {state}" for state, number in counts.items())


def run(required: Sequence[str]) -> Report:
    """Look at everything.

    Args:
        required: Extras that must be whole.

    Raises:
        ConfigError: There is no such extra, or none is known.
    """
    of = requirements.ours()
    if required and of is None:
        raise ConfigError(
            f"--require {required[0]}: extras are known by metadata, and these sources are not "
            "installed. Run pip install . where pyproject.toml lies."
        )
    known = requirements.extras(of) if of else []
    for extra in required:
        if extra not in known:
            raise ConfigError(f"There is no extra {extra!r}. Use one of: {', '.join(known)}.")
    return Report(
        (
            *_program(of),
            *(_extra(of, extra, is_required=extra in required) for extra in known if of),
            *_libraries(),
            *_tokenizers(),
            *_machine(),
        )
    )


def judge_extra(extra: str, demands: Sequence[requirements.Found], *, is_required: bool) -> Finding:
    """Say whether what an extra asks for is there; "" is the base."""
    name, package = extra or "base", f"patchcache[{extra}]" if extra else "patchcache"
    missing = [each.requirement.name for each in demands if each.version is None]
    unfit = [
        f"{each.requirement.name} {each.version} (needs {each.requirement.specifier})"
        for each in demands
        if each.version is not None and not each.fits
    ]
    hint = f"pip install -U '{package}'"
    if unfit:
        state: State = "broken" if is_required else "weak"
        return Finding("Extras", name, state, f"does not fit: {', '.join(unfit)}", hint)
    if missing:
        state = "broken" if is_required else "absent"
        return Finding("Extras", name, state, f"lacks {', '.join(missing)}", hint)
    return Finding("Extras", name, "ok", f"{len(demands)} requirements")


def _program(of: Distribution | None) -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Program", "python", "ok", f"{python}, {sys.executable}")
    if of is None:
        yield Finding(
            "Program", "patchcache", "broken", f"{__version__}, sources that are not installed",
            "pip install . where pyproject.toml lies; extras and plugins are known by metadata",
        )  # fmt: skip
        return
    if of.version != __version__:
        yield Finding(
            "Program", "patchcache", "weak", f"{__version__}, installed as {of.version}",
            "pip install it again: the metadata is of another version",
        )  # fmt: skip
    else:
        yield Finding("Program", "patchcache", "ok", __version__)
    yield judge_extra("", requirements.demands(of, ""), is_required=True)._replace(group="Program")


def _extra(of: Distribution, extra: str, *, is_required: bool) -> Finding:
    return judge_extra(extra, requirements.demands(of, extra), is_required=is_required)


def _libraries() -> Iterator[Finding]:
    """Try the compiled libraries that are installed, all at once."""
    probes = [
        probe
        for probe in doctor_probes.PROBES
        if any(requirements.installed_version(name) for name in probe.distributions)
    ]
    for probe, answer in zip(probes, doctor_probes.ask(probes), strict=True):
        if answer.problem:
            yield Finding("Libraries", probe.name, "broken", answer.problem, probe.hint_when_broken)
        for line in answer.lines:
            yield Finding("Libraries", line.name, line.state, line.value, line.hint)


def _tokenizers() -> Iterator[Finding]:
    for entry in sorted(entry_points(group="patchcache.tokenizers")):
        of = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        yield Finding("Tokenizers", entry.name, "ok", of)


def _machine() -> Iterator[Finding]:
    yield from judge_space("working folder", Path.cwd(), _FREE_BYTES, "give --out another disk")
    temporary = Path(tempfile.gettempdir())
    yield from judge_space("temporary files", temporary, _FREE_BYTES, "set TMPDIR to another disk")
    if _SHARED.is_dir():
        hint = "in a container start it with --shm-size=8g"
        yield from judge_space("shared memory", _SHARED, _FREE_SHARED_BYTES, hint)
    yield _open_files()


def judge_space(name: str, path: Path, enough: int, hint: str) -> Iterator[Finding]:
    """Say how much room there is at a path, bytes."""
    free = shutil.disk_usage(path).free
    value = f"{size_text(free)} free at {path}"
    if free < enough:
        hint = f"less than {size_text(enough)}: {hint}, or make room"
        yield Finding("Machine", name, "weak", value, hint)
    else:
        yield Finding("Machine", name, "ok", value)


def _open_files() -> Finding:
    try:
        import resource
    except ImportError:  # not on Windows
        return Finding("Machine", "open files", "ok", "no limit that Python knows")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} at most"
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        room = "" if hard == resource.RLIM_INFINITY else f" (up to {hard:,} without root)"
        return Finding(
            "Machine", "open files", "weak", value,
            f"ulimit -n 65536{room}: a service of many clients and Ray need more",
        )  # fmt: skip
    return Finding("Machine", "open files", "ok", value)
