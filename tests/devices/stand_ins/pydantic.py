"""What stands for pydantic on an image that has not got it.

Machines with a GPU often come with torch and little else, and cannot download. There the GPU
targets take this module for `pydantic`: models are filled from names, defaults and nested values,
validators of a whole model and of an annotated field are run, and nothing else is checked. Tests
and benchmarks that make their own settings ask for no more.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

_MISSING: Any = object()

JsonValue = Any
NonNegativeInt = int
SerializerFunctionWrapHandler = Callable[[Any], dict[str, Any]]


class ValidationError(ValueError):
    """A key that does not exist, one that is missing, or what a validator says."""

    def errors(self) -> list[dict[str, Any]]:
        """Return the one problem that is known."""
        return [{"loc": (), "type": "value_error", "msg": str(self), "input": None}]


class FieldInfo:
    """The default of a field; its other properties are not looked at."""

    def __init__(self, default: Any = _MISSING, *, default_factory: Any = None, **_: Any) -> None:
        """Take what stands for a value that is not given."""
        self.default = None if default is _MISSING else default
        self.annotation: Any = None
        self._is_required = default in (_MISSING, ...) and default_factory is None
        self._factory = default_factory

    def value(self) -> Any:
        """Return the default, anew if it is made by a function."""
        if self._is_required:
            raise ValidationError("a key is missing")
        return self._factory() if self._factory else self.default


def Field(default: Any = _MISSING, **properties: Any) -> Any:  # noqa: N802  as it is called there
    """Describe a field."""
    return FieldInfo(default, **properties)


class _AsAny:
    def __class_getitem__(cls, hint: Any) -> Any:
        return hint


SerializeAsAny = _AsAny


class AfterValidator:
    """What looks at the value of an annotated field, and may change it."""

    def __init__(self, look: Callable[[Any], Any]) -> None:
        """Take the function that does it."""
        self.look = look


def model_validator(*, mode: str) -> Callable[[Any], Any]:
    """Mark a method that looks at a whole model."""

    def mark(method: Any) -> Any:
        method.validates = mode
        return method

    return mark


def model_serializer(*, mode: str) -> Callable[[Any], Any]:
    """Mark a method that changes what a model is written as."""

    def mark(method: Any) -> Any:
        method.serialises = mode
        return method

    return mark


class BaseModel:
    """Values by name."""

    model_fields: ClassVar[dict[str, FieldInfo]] = {}
    _extra: ClassVar[str] = "ignore"  # what becomes of keys that are no fields

    def __init_subclass__(cls, *, extra: str | None = None, **_: Any) -> None:
        """Collect the fields of a class and of those that it stands on."""
        cls._extra = extra or cls._extra
        cls.model_fields = dict(cls.model_fields)
        for name, hint in get_type_hints(cls, include_extras=True).items():
            if get_origin(hint) is ClassVar or (name in cls.model_fields and name not in vars(cls)):
                continue
            default = vars(cls).get(name, _MISSING)
            field = default if isinstance(default, FieldInfo) else FieldInfo(default)
            field.annotation = hint
            cls.model_fields[name] = field

    def __init__(self, **values: Any) -> None:
        """Take values, and defaults for the others."""
        unknown = values.keys() - self.model_fields
        if unknown and self._extra == "forbid":
            raise ValidationError(f"unknown keys: {', '.join(sorted(unknown))}")
        for name, field in self.model_fields.items():
            try:
                value = _filled(field.annotation, values[name]) if name in values else field.value()
            except ValueError as exc:
                raise ValidationError(str(exc)) from exc
            self.__dict__[name] = value
        for method in _marked(type(self), "validates"):
            try:
                method(self)
            except ValueError as exc:
                raise ValidationError(str(exc)) from exc

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__dict__})"

    @classmethod
    def model_validate(cls, tree: Any) -> Any:
        """Return a model of a tree of plain values."""
        return tree if isinstance(tree, cls) else cls(**tree)

    @classmethod
    def model_validate_json(cls, text: str | bytes) -> Any:
        """Return a model of a JSON text."""
        try:
            return cls(**json.loads(text))
        except (TypeError, UnicodeDecodeError, json.JSONDecodeError) as exc:
            raise ValidationError(str(exc)) from exc

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Any:
        """Return the same with other values."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__ | dict(update or {}))
        return copy

    def model_dump(
        self, *, mode: str = "python", include: Any = None, exclude: Any = None
    ) -> dict[str, Any]:
        """Return plain values by name."""
        names = set(self.model_fields if include is None else include) - set(exclude or ())

        def dump(model: Any) -> dict[str, Any]:
            return {n: _plain(v, mode) for n, v in model.__dict__.items() if n in names}

        for method in _marked(type(self), "serialises"):
            result: dict[str, Any] = method(self, dump)
            return result
        return dump(self)


def _marked(model: type, mark: str) -> list[Any]:
    names = [name for base in reversed(model.__mro__) for name in vars(base)]
    methods = (getattr(model, name) for name in dict.fromkeys(names))
    return [method for method in methods if hasattr(method, mark)]


def _filled(hint: Any, value: Any) -> Any:
    """Return a value as the hint has it: models of mappings, tuples of lists."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _filled(args[0], value)
        for mark in args[1:]:
            value = mark.look(value) if isinstance(mark, AfterValidator) else value
        return value
    if origin in (Union, UnionType):
        others = [arg for arg in args if arg is not NoneType]
        return value if value is None else _filled(others[0], value)
    if isinstance(hint, type) and isinstance(value, Mapping) and issubclass(hint, BaseModel):
        return hint(**value)
    if origin is tuple and isinstance(value, list | tuple):
        hints = args[:1] * len(value) if args[-1] is ... else args
        return tuple(_filled(each, item) for each, item in zip(hints, value, strict=True))
    if origin is list:
        return [_filled(args[0], item) for item in value]
    if origin is dict:
        return {key: _filled(args[1], item) for key, item in value.items()}
    return float(value) if hint is float else value


def _plain(value: Any, mode: str) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode=mode)
    if isinstance(value, Mapping):
        return {key: _plain(item, mode) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_plain(item, mode) for item in value]
        return items if mode == "json" else type(value)(items)
    return str(value) if mode == "json" and isinstance(value, PurePath) else value
