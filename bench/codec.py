"""Frozen dataclasses to plain JSON values and back, strictly: the types are the schema.

Supported: dataclasses, `tuple[X, ...]`, `dict[str, X]`, `X | None`, unions of plain types, str, int, float, bool,
and `Any` for plain values that somebody else defines.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """What `json.dumps` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(cls: type[T], value: Any) -> T:
    """The inverse of `to_plain`. ValueError names the place of a missing, unknown or mistyped value."""
    return _read(cls, value, cls.__name__)


def _read(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, place)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        kinds = [argument for argument in arguments if argument is not type(None)]
        if value is None and len(kinds) < len(arguments):
            return None
        return _read(type(value) if type(value) in kinds else kinds[0], value, place)
    if origin is tuple:
        items = _expect(list, value, place)
        return tuple(_read(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        items = _expect(dict, value, place)
        return {key: _read(arguments[1], item, f"{place}[{key!r}]") for key, item in items.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _expect(kind, value, place)


def _read_dataclass(cls: Any, value: Any, place: str) -> Any:
    values = _expect(dict, value, place)
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    missing = [name for name in names if name not in values]
    unknown = [name for name in values if name not in names]
    if missing or unknown:
        raise ValueError(f"{place}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
    return cls(**{name: _read(hints[name], values[name], f"{place}.{name}") for name in names})


def _expect(kind: type, value: Any, place: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{place} must be of type {kind.__name__}, got {value!r}")
    return value
