"""Dataclasses as plain JSON values, and back with every type checked: a damaged file is found where it is damaged."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ffjax.ir.spec import MeshShape

T = TypeVar("T")


def to_plain(value: object) -> object:
    """Dataclasses as JSON objects; fields whose metadata has `plain=False` are left out."""
    if isinstance(value, MeshShape):
        return value.as_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in _fields(type(value))}
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    return value


def from_plain(kind: type[T], value: object, where: str = "") -> T:
    """The dataclass that a JSON object stands for; raises ValueError that says where it is not one.

    Fields whose metadata has `optional=True` may be missing: they came after files that are still read.
    """
    return _read(kind, value, where)  # type: ignore[return-value]


def _read(kind: object, value: object, where: str) -> object:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is MeshShape:
        sizes = _read(dict[str, int], value, where)
        assert isinstance(sizes, dict)  # just read
        return MeshShape(tuple(sizes), tuple(sizes.values()))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where)
    if origin is tuple:
        items = _expect(list, value, where)
        if arguments[-1] is Ellipsis:
            return tuple(_read(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(items))
        if len(items) != len(arguments):
            raise ValueError(f"{where} has {len(items)} entries, expected {len(arguments)}")
        return tuple(_read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, items, strict=True)))
    if origin is dict:
        return {str(k): _read(arguments[1], v, f"{where}.{k}") for k, v in _expect(dict, value, where).items()}
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}, expected one of {', '.join(map(str, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _read(arguments[0], value, where)
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ValueError(f"{where} is {value!r}, expected a number")
        return float(value)
    return _expect(kind, value, where)  # type: ignore[arg-type]


def _expect(kind: type[T], value: object, where: str) -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where or 'the whole'} is {str(value)[:60]!r}, expected {kind.__name__}")
    return value


def _read_fields(kind: type, value: object, where: str) -> object:
    content = _expect(dict, value, where)
    hints = _hints(kind)
    known = {f.name for f in _fields(kind)}
    if unknown := content.keys() - known:
        raise ValueError(f"{where or 'the whole'} has the unknown field {sorted(unknown)[0]!r}")
    needed = {f.name for f in _fields(kind) if not f.metadata.get("optional", False)}
    if missing := needed - content.keys():
        raise ValueError(f"{where or 'the whole'} lacks the field {sorted(missing)[0]!r}")
    return kind(**{k: _read(hints[k], v, f"{where}.{k}" if where else k) for k, v in content.items()})


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    return get_type_hints(kind)


@functools.cache
def _fields(kind: type) -> tuple[dataclasses.Field[object], ...]:
    return tuple(f for f in dataclasses.fields(kind) if f.metadata.get("plain", True))
