"""What a service is told before it starts: the codebooks, the device, the limits, who may ask.

`create_app` takes it as it is, the command line fills it, and `PATCHCACHE_SERVE_*` of the
environment is read in `serve.py` alone.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from cache_builder.errors import ConfigError
from tokenizers_svc.access import AccessOptions
from tokenizers_svc.limits import Limits

# A name is a part of paths such as /v1/models/NAME.
_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,128}")


class ServiceOptions(BaseModel, frozen=True, extra="forbid"):
    """Everything that a service may be told."""

    codebooks: dict[str, str] = Field(
        default_factory=dict, description="name to path; the first is the default model"
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda`, `cuda:N`")
    weights: str | None = Field(
        None, description="weights file of the feature model, if not where the codebook says"
    )
    num_cores: int = Field(
        0, ge=0, description="cores that the process may keep busy; 0: all that it is given"
    )
    limits: Limits = Field(default_factory=Limits)
    access: AccessOptions = Field(default_factory=AccessOptions)
    page: bool = Field(True, description="whether there is a page at /")
    docs: bool = Field(True, description="whether there are /docs and /openapi.json")


def name_codebooks(values: Iterable[str | Path]) -> dict[str, str]:
    """Return name to path of codebooks given as `PATH` or `NAME=PATH`.

    A codebook without a name is called by its file name without the suffix.

    Raises:
        ConfigError: A name is given twice or cannot be part of a URL's path.
    """
    codebooks: dict[str, str] = {}
    for value in map(str, values):
        name, _, path = value.partition("=") if _is_named(value) else (Path(value).stem, "", value)
        if name in codebooks:
            raise ConfigError(
                f"Two codebooks are called {name!r}. Name one of them: --codebook OTHER={path}"
            )
        codebooks[check_name(name)] = path
    return codebooks


def read_limits(assignments: Iterable[str]) -> Limits:
    """Return the defaults with NAME=VALUE pairs put in their places.

    Raises:
        ConfigError: There is no limit of a name, or a value is not one that it takes.
    """
    values: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--limit takes NAME=VALUE, not {assignment!r}.")
        if name not in Limits.model_fields:
            near = difflib.get_close_matches(name, Limits.model_fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else "GET /v1/models shows their names."
            raise ConfigError(f"There is no limit {name!r}; {hint}")
        values[name] = value
    try:
        return Limits.model_validate(values)
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        name = str(error["loc"][0])
        raise ConfigError(f"--limit {name}={values[name]}: {error['msg']}.") from None


def check_name(name: str) -> str:
    """Return the name of a model.

    Raises:
        ConfigError: It cannot be part of a URL's path.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a model: 1 to 128 characters, no slash. "
            "Give another one: --codebook NAME=PATH"
        )
    return name


def _is_named(value: str) -> bool:
    """Tell `name=path` from a path that holds an equals sign."""
    name, equals, _ = value.partition("=")
    return bool(equals) and "/" not in name and not Path(value).exists()
