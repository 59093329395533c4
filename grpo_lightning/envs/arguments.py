"""Checking the arguments of a call against a tool's JSON schema."""

import json
from collections.abc import Mapping
from typing import Any

_NAMES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


class ArgumentError(ValueError):
    """Arguments that do not fit, in words for the policy."""


def checked_arguments(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the tool takes them.

    3.0 is an integer and 3 a number, but true is neither. Text where a string does not fit is taken for the JSON value
    that it spells: formats without types give all values as text.

    Args:
        schema: Schema of the parameters: an object with ``properties`` and ``required``.
        arguments: Values by name.

    Raises:
        ArgumentError: Naming all that is missing or unknown, or else the first value of another type.
    """
    properties: Mapping[str, Any] = schema.get("properties", {})
    missing = [name for name in schema.get("required", ()) if name not in arguments]
    unknown = [name for name in arguments if name not in properties]
    problems = [f"{name!r} is missing" for name in missing] + [f"there is no {name!r}" for name in unknown]
    if problems:
        takes = ", ".join(map(repr, properties)) or "none"
        raise ArgumentError(f"wrong arguments: {', '.join(problems)}; the arguments are {takes}")
    return {name: _fitting(properties[name], value, name) for name, value in arguments.items()}


def _fitting(schema: Mapping[str, Any], value: Any, place: str) -> Any:
    try:
        return _converted(schema, value, place)
    except ArgumentError as problem:
        if not isinstance(value, str):
            raise
        try:
            spelled = json.loads(value)
        except (ValueError, RecursionError):
            raise problem from None
    return _converted(schema, spelled, place)


def _converted(schema: Mapping[str, Any], value: Any, place: str) -> Any:
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            try:
                return _converted(option, value, place)
            except ArgumentError:
                continue
        raise _wrong(place, "one of several types", value)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    # A union lists its types by name: an integer stays one where a number would do as well.
    fitting = [kind for kind in kinds if _is(kind, value)]
    if kinds and not fitting:
        raise _wrong(place, " or ".join(_NAMES.get(kind, kind) for kind in kinds), value)
    if fitting:
        value = _of_kind(fitting[0], schema, value, place)
    if "enum" in schema and value not in schema["enum"]:
        raise _wrong(place, f"one of {', '.join(map(json.dumps, schema['enum']))}", value)
    return value


def _is(kind: str, value: Any) -> bool:
    match kind:
        case "integer":
            return type(value) is int or (isinstance(value, float) and value.is_integer())
        case "number":
            return type(value) in (int, float)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case "null":
            return value is None
    return False


def _of_kind(kind: str, schema: Mapping[str, Any], value: Any, place: str) -> Any:
    match kind:
        case "integer":
            return int(value)
        case "number":
            try:
                return float(value)
            except OverflowError:
                raise _wrong(place, "a number that is not so large", value) from None
        case "array":
            items = schema.get("prefixItems")
            if items is not None and len(items) != len(value):
                raise _wrong(place, f"a list of {len(items)} values", value)
            items = items or [schema.get("items", {})] * len(value)
            return [
                _fitting(item, part, f"{place}[{i}]") for i, (item, part) in enumerate(zip(items, value, strict=True))
            ]
        case "object":
            inner = schema.get("additionalProperties", {})
            return {key: _fitting(inner, part, f"{place}[{key!r}]") for key, part in value.items()}
    return value


def _wrong(place: str, expected: str, value: Any) -> ArgumentError:
    got = json.dumps(value, ensure_ascii=False)
    return ArgumentError(f"wrong arguments: expected {place} to be {expected}, but got {got[:100]}")
