"""The forms in which token ids are sent back: JSON, msgpack, npy and bare little-endian uint16.

One grid may be flat or nested as the model's shape is; a batch is several of either. The length of
what is sent is held against the model before a value is made.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from tokenizers_svc.bodies import kind_of, parse_fields, too_many
from tokenizers_svc.forms import NPY
from tokenizers_svc.intake import Upload, media_type_of
from tokenizers_svc.limits import Limits
from tokenizers_svc.problems import ProblemError
from tokenizers_svc.registry import Served
from tokenizers_svc.schemas import FieldError

_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER = re.compile(
    rb"\{'descr': '([ -&(-~]{1,16})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,18}, ?){0,8}[0-9]{0,18})\), \} *\n"
)
_INTEGERS = re.compile(r"[<>|=]?[iu][1248]")
_VALUES_BESIDE_IDS = 64
_MAX_DEPTH = 5
_MAX_ERRORS = 10


class Grids(NamedTuple):
    """Token ids of one picture or of several."""

    ids: NDArray[np.int64]  # (B, *shape of the model)
    is_batch: bool


async def read_grids(request: Request, upload: Upload, served: Served, limits: Limits) -> Grids:
    """Return the token ids of a request.

    Raises:
        ProblemError: 400, 408, 413, 415, or 422 for ids that are not those of the model.
    """
    kind = kind_of(request)
    if kind == "multipart":
        raise ProblemError("unsupported-body", "Token ids come as JSON, msgpack, npy or raw.")
    body = await upload.read()
    if kind == "raw":
        is_npy = media_type_of(request) == NPY or body.startswith(_NPY_MAGIC)
        return _shaped(_read_npy(body) if is_npy else _read_raw(body, served), served, limits)
    size = math.prod(served.shape)
    # Every list that holds ids counts too, down to those of one patch.
    max_values = 2 * limits.max_items * size + _VALUES_BESIDE_IDS
    fields = parse_fields(kind, body, max_values, too_many(limits.max_items))
    if set(fields) != {"token_ids"}:
        raise ProblemError("bad-request", "The body has one field, `token_ids`.")
    token_ids = fields["token_ids"]
    if isinstance(token_ids, bytes):
        return _shaped(_read_raw(token_ids, served), served, limits)
    return _shaped(_read_nested(token_ids), served, limits)


def _read_raw(body: bytes, served: Served) -> NDArray[np.int64]:
    """Return ids of a body that says nothing of their shape: a batch if it has more than one."""
    size = math.prod(served.shape)
    if not body or len(body) % (2 * size):
        raise _invalid(
            f"One picture has {size} ids of {list(served.shape)}, {2 * size} bytes as uint16; "
            f"{len(body):,} bytes are not a multiple.",
            "",
            "wrong length",
        )
    ids = np.frombuffer(body, "<u2").astype(np.int64)
    return ids if len(ids) == size else ids.reshape(-1, size)


def _read_npy(body: bytes) -> NDArray[np.int64]:
    """Return the array of an npy file.

    Its header is a Python literal. NumPy has Python parse it, which is a door that nobody needs;
    what NumPy itself writes of an array of integers has one form.
    """
    start = 10 + int.from_bytes(body[8:10], "little")
    header = _NPY_HEADER.fullmatch(body[10:start]) if body[6:8] == b"\x01\x00" else None
    if header is None:
        raise ProblemError("bad-request", "The body is not an npy file as numpy.save writes it.")
    descr, order, sides = (group.decode("ascii") for group in header.groups())
    shape = tuple(int(side) for side in sides.split(",") if side.strip())
    content = body[start:]
    is_integers = _INTEGERS.fullmatch(descr) is not None
    # Beside a side of 0 the others may be longer than NumPy can count.
    if (
        not is_integers
        or not content
        or len(content) != math.prod(shape) * np.dtype(descr).itemsize
    ):
        raise _invalid("The npy file has to hold integers, all of them.", "", "not whole integers")
    ids = np.frombuffer(content, descr).astype(np.int64)
    return ids.reshape(shape, order="F" if order == "True" else "C")


def _read_nested(value: Any) -> NDArray[np.int64]:
    shape: list[int] = []
    deepest = value
    while isinstance(deepest, list) and deepest and len(shape) < _MAX_DEPTH:
        shape.append(len(deepest))
        deepest = deepest[0]
    if not shape:
        raise _invalid("Token ids are a list that is not empty.", "/token_ids", "not such a list")
    ids = list(_leaves(value, tuple(shape), "/token_ids"))
    return np.array(ids, np.int64).reshape(shape)


def _leaves(value: Any, shape: tuple[int, ...], pointer: str) -> Iterator[int]:
    """Give the ids of nested lists, which all have to have the shape of the first ones."""
    if not shape:
        if type(value) is not int or not -(2**31) <= value < 2**31:
            raise _invalid("Token ids are integers.", pointer, "this is no token id")
        yield value
        return
    if not isinstance(value, list) or len(value) != shape[0]:
        raise _invalid(
            "Lists of token ids beside each other have the same length.",
            pointer,
            f"this is not a list of {shape[0]}",
        )
    for index, part in enumerate(value):
        yield from _leaves(part, shape[1:], f"{pointer}/{index}")


def _shaped(ids: NDArray[np.int64], served: Served, limits: Limits) -> Grids:
    """Return ids that were sent in any of the shapes as (B, *shape).

    Raises:
        ProblemError: 422, 413.
    """
    size, one = math.prod(served.shape), served.shape
    is_one = ids.shape in (one, (size,))
    if not is_one and (ids.shape[1:] not in (one, (size,)) or not len(ids)):
        raise _invalid(
            f"Ids of one picture have the shape {list(one)} or [{size}], those of several one "
            f"more dimension in front; these have {list(ids.shape)}.",
            "/token_ids",
            "wrong shape",
        )
    grids = ids.reshape(-1, *one)
    if len(grids) > limits.max_items:
        raise too_many(limits.max_items, len(grids))
    wrong = np.argwhere((ids < 0) | (ids >= served.codebook.vocab_size))
    if len(wrong):
        last = served.codebook.vocab_size - 1
        raise ProblemError(
            "invalid-tokens",
            f"Token ids of this model are 0 to {last}; {len(wrong):,} of {ids.size:,} are not.",
            errors=[
                FieldError(
                    pointer="/token_ids/" + "/".join(map(str, place)),
                    message=f"{ids[tuple(place)]} is not in 0 to {last}",
                )
                for place in wrong[:_MAX_ERRORS]
            ],
        )
    return Grids(grids, is_batch=not is_one)


def _invalid(detail: str, pointer: str, message: str) -> ProblemError:
    error = FieldError(pointer=pointer, message=message)
    return ProblemError("invalid-tokens", detail, errors=[error])
