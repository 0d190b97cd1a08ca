"""The fields of a request's head, looked up by one dictionary for all who ask.

`starlette.datastructures.Headers` goes through the whole head at every question, and a request of a
picture asks nine.
"""

from typing import Final, overload

from starlette.types import Scope

_KEY: Final = "patchcache.fields"


@overload
def field_of(scope: Scope, name: bytes) -> str | None: ...
@overload
def field_of(scope: Scope, name: bytes, default: str) -> str: ...
def field_of(scope: Scope, name: bytes, default: str | None = None) -> str | None:
    """Return a field of a request's head; of several of one name, the first.

    Args:
        scope: Of the request; its head does not change any more.
        name: Lower case.
        default: For a head without it.
    """
    fields: dict[bytes, bytes] | None = scope.get(_KEY)
    if fields is None:
        fields = scope[_KEY] = dict(reversed(scope["headers"]))
    value = fields.get(name)
    return default if value is None else value.decode("latin-1")
