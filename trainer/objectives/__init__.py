"""The table of methods: what a model predicts from a cache, one small module each.

`interface` says what such a module has; `hiding` is what masking methods share. A further method is
a module of this package and its name in `METHOD_NAMES`.
"""

import importlib
from typing import Final, cast

from trainer.objectives.interface import Method

METHOD_NAMES: Final = ("beit", "mcbeit", "dmjd")


def load_method(name: str) -> Method:
    """Return the module of a method; only methods that are used are imported."""
    return cast(Method, importlib.import_module(f"{__name__}.{name}"))
