"""Build the kernels with the C++ compiler of this machine.

The sources are compiled once per instruction set and the library chooses when it is called, so a
library that was built on one machine runs on another of the same architecture. Standard library
only: this runs while the package is being installed.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARY = SOURCES / ("kernels.dylib" if sys.platform == "darwin" else "kernels.so")

_FLAGS = [
    "-O3", "-fPIC", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-psabi",
]  # fmt: skip
# The oldest processor of the architecture, whatever the compiler's own default.
_X86_BASELINE = ["-march=x86-64"]
_X86_VARIANTS = {
    "avx512": (16, ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma",
                    "-mprefer-vector-width=512"]),
    "avx2": (8, ["-mavx2", "-mfma"]),
}  # fmt: skip


class BuildError(Exception):
    """There is no compiler, or it failed; the text says why."""


def build(library: Path = LIBRARY) -> Path:
    """Compile the kernels into `library`, whole or not at all.

    Raises:
        BuildError: There is no C++ compiler, or it refuses the sources.
    """
    compiler = _compiler()
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    flags = [*_FLAGS, *(_X86_BASELINE if is_x86 else [])]
    # The portable one first: of template instances that all variants have, the linker keeps the
    # first, and that must run everywhere.
    variants = {"portable": (4, list[str]())} | (_X86_VARIANTS if is_x86 else {})
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = []
        for name, (lanes, more) in variants.items():
            objects.append(str(Path(scratch) / f"{name}.o"))
            defines = [f"-DPATCHCACHE_LANES={lanes}", f"-DPATCHCACHE_VARIANT=assign_{name}"]
            source = str(SOURCES / "nearest.cpp")
            _run([compiler, *flags, *more, *defines, "-c", source, "-o", objects[-1]])
        defines = ["-DPATCHCACHE_X86"] if is_x86 else []
        linked = Path(scratch) / library.name
        source = str(SOURCES / "dispatch.cpp")
        _run([compiler, *flags, *defines, "-shared", source, *objects, "-o", str(linked)])
        linked.replace(library)
    return library


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("there is no C++ compiler (c++, g++ or clang++; $CXX names another)")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"`{' '.join(command)}` failed:\n{result.stderr.strip()}")


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{build()}\n")
    except BuildError as exc:
        sys.exit(f"The kernels were not built: {exc}")
