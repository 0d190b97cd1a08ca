"""The door to the compiled kernels: ctypes, and nothing if they were not built."""

import ctypes
import logging
from functools import cache
from typing import Any

from cache_builder.tokenizers.kernels.build import LIBRARY

logger = logging.getLogger(__name__)

_VERSION = 2  # PATCHCACHE_VERSION of nearest.h
GROUP = 64  # centroids per panel, kGroup of nearest.cpp


class Index(ctypes.Structure):
    """`PatchcacheIndex` of nearest.h."""

    _fields_ = [
        ("type", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("prefix", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("skew", ctypes.c_double),
        ("mean", ctypes.c_void_p),
        ("basis", ctypes.c_void_p),
        ("panels", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("centroids", ctypes.c_void_p),
    ]


class Kernels:
    """The functions of the library; they release the interpreter's lock while they run."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Declare the functions of a library of our version."""
        self._library = library
        library.patchcache_variant.restype = ctypes.c_char_p
        library.patchcache_choose.argtypes = [ctypes.c_char_p]
        self.assign: Any = library.patchcache_assign
        self.assign.restype = ctypes.c_int64
        self.assign.argtypes = [
            ctypes.POINTER(Index), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip

    @property
    def variant(self) -> str:
        """Instruction set in use: avx512, avx2 or portable."""
        name: bytes = self._library.patchcache_variant()
        return name.decode()

    def choose(self, variant: str | None) -> bool:
        """Use another variant, None for the fastest; say whether this processor has it."""
        return bool(self._library.patchcache_choose(variant.encode() if variant else None))


@cache
def kernels() -> Kernels | None:
    """Return the compiled kernels, or None where they were not built."""
    if not LIBRARY.is_file():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
        version = int(library.patchcache_version())
    except (OSError, AttributeError) as exc:
        logger.warning("the compiled kernels cannot be loaded (%s); going on without them", exc)
        return None
    if version != _VERSION:
        logger.warning(
            "the compiled kernels have version %d, not %d; going on without them. "
            "Install patchcache again.", version, _VERSION,
        )  # fmt: skip
        return None
    return Kernels(library)
