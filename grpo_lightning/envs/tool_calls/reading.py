"""What the formats share: from JSON text to a call, or to what is wrong with it."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from grpo_lightning.rollout.types import ToolCall

OBJECT = r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"[^"\n]*"\s*,\s*"(?:parameters|arguments)"\s*:'
"""Pattern of how a call as a JSON object begins, where no marker says that it is one."""

_EXPECTED = 'expected {"name": ..., "arguments": {...}}'
_NAME = re.compile(r'[\s\[]*\{\s*"name"\s*:\s*"([^"\n]*)"')


@dataclass(frozen=True)
class Format:
    """One way to write calls.

    Attributes:
        marker: What tells it from prose and from other formats.
        parse: Reads the calls in a text that is known to be in this format.
        form: How a call looks, in words for a policy that has to learn it.
    """

    marker: re.Pattern[str]
    parse: Callable[[str], list[ToolCall]]
    form: str


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


# Models put line breaks into strings (code, above all), which strict JSON forbids.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_not_json)


def unreadable(error: str, name: str = "") -> ToolCall:
    """A call that is there but cannot be read."""
    return ToolCall(name, error=error)


def cut_off(end: str, name: str = "") -> ToolCall:
    """A call whose end is missing."""
    return unreadable(f"the call was cut off: expected {end} at its end", name)


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value at a place in the text, and the place after it.

    Raises:
        ValueError: Saying what is there instead.
    """
    while start < len(text) and text[start].isspace():
        start += 1
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("values that are nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"text that is not JSON ({error.msg} at character {error.pos - start})") from None


def read_call(name: str, arguments: Any, id: str = "") -> ToolCall:
    """The call with these parts; arguments may be given as JSON text. An error if they are not plain values."""
    try:
        if isinstance(arguments, str):
            text = arguments.strip()
            arguments, end = decode(text)
            if end < len(text):
                raise ValueError(f"more text after its end: {text[end:][:100]!r}")
        if not isinstance(arguments, dict):
            raise ValueError(type(arguments).__name__)
        plain = json.dumps([name, arguments], allow_nan=False, ensure_ascii=False)
        # Half of a surrogate pair would fail in the tokenizer, far from here.
        plain.encode("utf-8")
        _, arguments = json.loads(plain)
    except UnicodeEncodeError:
        return unreadable("the call is not valid Unicode text")
    except (TypeError, ValueError, RecursionError) as error:
        return unreadable(f"expected the arguments as a JSON object, but got {error}", name)
    return ToolCall(name, arguments, id)


def json_calls(text: str, start: int) -> tuple[list[ToolCall], int]:
    """The calls of the JSON object, or list of objects, at a place in the text, and the place after it.

    What cannot be read is one call with an error, and the place is the given one.
    """
    try:
        value, end = decode(text, start)
    except ValueError as error:
        found = _NAME.match(text, start)
        return [unreadable(f"{_EXPECTED}, but got {error}", found[1] if found else "")], start
    return [_described(item) for item in (value if isinstance(value, list) else [value])], end


def _described(value: Any) -> ToolCall:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value | value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return unreadable(f"{_EXPECTED}, but got {json.dumps(value)[:100]}")
    given = [value[key] for key in ("arguments", "parameters") if value.get(key) is not None]
    id = value.get("id")
    return read_call(value["name"], given[0] if given else {}, id if isinstance(id, str) else "")
