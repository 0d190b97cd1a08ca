"""What the extras of the installed distribution ask for, and what of it is there.

Everything is read from the metadata of installed distributions; nothing is imported or downloaded.
"""

from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = "patchcache"
_SUMS = frozenset({"all", "demo", "dev"})  # extras that are made of others


class Found(NamedTuple):
    """A requirement, and the version that is installed."""

    requirement: Requirement
    version: str | None

    @property
    def fits(self) -> bool:
        """Whether it is installed in a version that was asked for."""
        if self.version is None:
            return False
        return self.requirement.specifier.contains(self.version, prereleases=True)


def ours() -> Distribution | None:
    """Return the metadata of patchcache; None where its sources are run without installing them."""
    try:
        return distribution(OURS)
    except PackageNotFoundError:
        return None


def extras(of: Distribution) -> list[str]:
    """Return the extras that stand for a role."""
    return sorted(set(of.metadata.get_all("Provides-Extra") or ()) - _SUMS)


def demands(of: Distribution, extra: str) -> list[Found]:
    """Return what an extra asks for, by itself and by extras of ours that it names.

    Args:
        of: Our distribution.
        extra: Its name; "" is what every installation needs.
    """
    wanted = {str(each): each for each in _resolve(of, extra, frozenset())}
    return [Found(each, installed_version(each.name)) for _, each in sorted(wanted.items())]


def installed_version(name: str) -> str | None:
    """Return the version of a distribution, None where it is not installed."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def requirements_of(of: Distribution, extra: str) -> Iterator[Requirement]:
    """Yield what the metadata asks for on this machine with an extra, "" for none."""
    for text in of.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            is_asked = not extra  # what holds without an extra is not the extra's
        else:
            is_asked = bool(extra) and marker.evaluate({"extra": extra})
        if is_asked:
            yield requirement


def _resolve(of: Distribution, extra: str, above: frozenset[str]) -> Iterator[Requirement]:
    for requirement in requirements_of(of, extra):
        if canonicalize_name(requirement.name) != OURS:
            yield requirement
            continue
        for other in requirement.extras - above:
            yield from _resolve(of, other, above | {extra})
