"""Values of any kind as JSON text and back, without pickle: what is plain comes back equal, the rest as its repr."""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_ESCAPED = "\0"
"""Begins a text that is stored with escapes."""

_TAG = "$"
"""Begins the only key of an object that stands for something JSON has no type for."""

_MAX_DEPTH = 100
_MAX_SHOWN = 500
_MAX_INT_BITS = 10_000
"""Python reads and writes integers of up to 4300 digits."""

_ARRAY_KINDS = "biufcmMSU"
"""Numpy's kinds that are plain bytes; not objects and records."""


@dataclass(frozen=True)
class NotStored:
    """Stands, after loading, where a value was that is not plain.

    Attributes:
        kind: Its class.
        shown: Its repr, at most 500 characters.
    """

    kind: str
    shown: str


def to_text(text: str) -> str:
    """A text as valid Unicode: lone surrogates, which no file format takes, are escaped."""
    if not text.startswith(_ESCAPED) and not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return _ESCAPED + text.encode("unicode_escape").decode("ascii")


def from_text(text: str) -> str:
    """The text that `to_text` was given."""
    return text[1:].encode("ascii").decode("unicode_escape") if text.startswith(_ESCAPED) else text


def to_json(value: Any) -> str:
    """A value as JSON text.

    None, bool, numbers, text, bytes, lists, tuples, mappings, and numpy's scalars and arrays of these come back equal;
    NaN and infinity too. Anything else is kept as `NotStored`.
    """
    return json.dumps(_plain(value, ()), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def from_json(text: str) -> Any:
    """The value that `to_json` was given.

    Raises:
        ValueError: If the text was not made by it.
    """
    return _value(json.loads(text))


def _plain(value: Any, within: tuple[Any, ...]) -> Any:
    if len(within) >= _MAX_DEPTH or any(outer is value for outer in within):
        return _not_stored(value)
    try:
        return _scalar(value) if not isinstance(value, list | tuple | Mapping) else _container(value, (*within, value))
    except Exception:
        # What a task's data can be raises what it likes, which is no reason to stop a training.
        return _not_stored(value)


def _scalar(value: Any) -> Any:
    match value:
        case None | bool():
            return value
        case np.ndarray() | np.generic() if _is_plain(value):
            shape = list(value.shape) if isinstance(value, np.ndarray) else None
            return {"$numpy": [value.dtype.str, shape, _base64(value.tobytes())]}
        case str():
            return to_text(str.__str__(value))
        case int() if value.bit_length() <= _MAX_INT_BITS:
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        case bytes():
            return {"$bytes": _base64(value)}
        case NotStored():
            return {"$repr": [to_text(value.kind), to_text(value.shown)]}
        case _:
            return _not_stored(value)


def _is_plain(value: Any) -> bool:
    return value.dtype.kind in _ARRAY_KINDS and (isinstance(value, np.generic) or type(value) is np.ndarray)


def _container(value: Any, within: tuple[Any, ...]) -> Any:
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith(_TAG) for key in value):
            return {to_text(str.__str__(key)): _plain(item, within) for key, item in value.items()}
        return {"$dict": [[_plain(key, within), _plain(item, within)] for key, item in value.items()]}
    items = [_plain(item, within) for item in value]
    return {"$tuple": items} if isinstance(value, tuple) else items


def _not_stored(value: Any) -> dict[str, list[str]]:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    try:
        shown = repr(value)
    except Exception:
        shown = ""
    return {"$repr": [to_text(kind), to_text(shown[:_MAX_SHOWN])]}


def _value(plain: Any) -> Any:
    match plain:
        case str():
            return from_text(plain)
        case list():
            return [_value(item) for item in plain]
        case dict() if any(key.startswith(_TAG) for key in plain):
            ((tag, content),) = plain.items()
            return _tagged(tag, content)
        case dict():
            return {from_text(key): _value(item) for key, item in plain.items()}
        case _:
            return plain


def _tagged(tag: str, content: Any) -> Any:
    match tag:
        case "$tuple":
            return tuple(_value(item) for item in content)
        case "$dict":
            return {_value(key): _value(item) for key, item in content}
        case "$float":
            return float(content)
        case "$bytes":
            return base64.b64decode(content)
        case "$numpy":
            dtype, shape, data = content
            array = np.ndarray(shape or (), dtype, bytearray(base64.b64decode(data)))
            return array[()] if shape is None else array
        case "$repr":
            return NotStored(*map(from_text, content))
        case _:
            raise ValueError(f"expected a tag that this version knows, but got {tag!r}")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
