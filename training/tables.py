"""Nested tables, as TOML and JSON have them, read into frozen dataclasses; every key and number is checked."""

import contextlib
import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Sequence
from typing import Any

from training.errors import UserError


def parse_override(text: str) -> dict[str, Any]:
    """The tables that a line ``key=value`` stands for; a bare word counts as a string.

    Raises:
        UserError: no ``=``, or no key of TOML before it.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r} is not key=value: the '=' is missing")
    for candidate in (text, f"{key}={_quoted(value)}"):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return tomllib.loads(candidate)
    raise UserError(f'--set {text!r}: {key!r} is not a key; give data.window=1024 or stage."2.2".lr=1e-4')


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def merge(into: dict[str, Any], table: dict[str, Any]) -> None:
    """Put the values of nested tables into others."""
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def build(kind: Any, value: Any, where: str, at: str = "") -> Any:
    """A value of an annotated type.

    Args:
        kind: a dataclass, a plain type, or a dict, a tuple or an optional one of them.
        value: as read.
        where: what it was read from, for messages.
        at: the key it stands at; empty for the outermost table.

    Raises:
        UserError: an unknown key, one that is missing, or a value of another type; it names the key.
    """
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = [option for option in typing.get_args(kind) if option is not type(None)]
        return build(inner[0], value, where, at)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where, at)
    if origin is dict and isinstance(value, dict):
        element = typing.get_args(kind)[1]
        return {key: build(element, item, where, f"{at}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(build(typing.get_args(kind)[0], item, where, at) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or kind
    if not isinstance(value, plain) or (plain is not bool and isinstance(value, bool)):
        raise UserError(f"{where}: {at.lstrip('.')} must be {plain.__name__}, got {value!r}")
    return value


def _build_dataclass(kind: Any, value: Any, where: str, at: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {at.lstrip('.')} must be a table, got {value!r}")
    kinds = typing.get_type_hints(kind)
    for key in value:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(kinds)}"
            raise UserError(f"{where}: unknown key {f'{at}.{key}'.lstrip('.')!r}{hint}")
    missing = [f.name for f in dataclasses.fields(kind) if _is_required(f) and f.name not in value]
    if missing:
        raise UserError(f"{where}: {f'{at}.{missing[0]}'.lstrip('.')} is missing")
    return kind(**{key: build(kinds[key], item, where, f"{at}.{key}") for key, item in value.items()})


def _is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def check_positive(where: str, numbers: Any, *names: str) -> None:
    for name in names:
        value = getattr(numbers, name)
        if value is not None and value <= 0:
            raise UserError(f"{where}: {name} must be positive, got {value}")


def check_not_negative(where: str, numbers: Any, *names: str) -> None:
    for name in names:
        if getattr(numbers, name) < 0:
            raise UserError(f"{where}: {name} must not be negative, got {getattr(numbers, name)}")


def check_share(where: str, numbers: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(numbers, name) <= 1:
            raise UserError(f"{where}: {name} is a share in [0, 1], got {getattr(numbers, name)}")


def check_one_of(where: str, numbers: Any, name: str, choices: Sequence[str]) -> None:
    if getattr(numbers, name) not in choices:
        raise UserError(f"{where}: {name} must be {' or '.join(choices)}, got {getattr(numbers, name)!r}")
