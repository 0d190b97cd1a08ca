"""Distributions with tokenizers, installed for a test and gone after it."""

import contextlib
import importlib
import sys
import zipfile
from pathlib import Path

VQ = Path(__file__).parent / "plugin_vq"


def install(project: Path, target: Path) -> Path:
    """Build the wheel of a project and unpack it, which is what pip does with it."""
    from hatchling.builders.wheel import WheelBuilder

    for wheel in WheelBuilder(str(project)).build(directory=str(target / "wheels")):
        zipfile.ZipFile(wheel).extractall(target / "site")
    return target / "site"


def offer(target: Path, code: str, *, distribution="odd", module="odd_tokenizers", **names) -> Path:
    """Write a distribution of one module whose entry points are `names`, name to function."""
    site = target / distribution
    info = site / f"{distribution}-1.5.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
    lines = [f"{name} = {module}:{function}" for name, function in names.items()]
    (info / "entry_points.txt").write_text("\n".join(["[patchcache.tokenizers]", *lines, ""]))
    return site


@contextlib.contextmanager
def on_path(*sites: Path):
    """Let Python find what lies in these folders."""
    before = set(sys.modules)
    sys.path[:0] = map(str, sites)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for site in sites:
            sys.path.remove(str(site))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and any(Path(file).is_relative_to(site) for site in sites):
                del sys.modules[name]
        importlib.invalidate_caches()
