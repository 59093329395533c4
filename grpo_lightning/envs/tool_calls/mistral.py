"""``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`` and, newer, ``[TOOL_CALLS]name[ARGS]{...}``: Mistral."""

import re
from dataclasses import replace

from grpo_lightning.envs.tool_calls.reading import OBJECT, Format, decode, json_calls, read_call, unreadable
from grpo_lightning.rollout.types import ToolCall

_TAG = "[TOOL_CALLS]"
_LIST = re.compile(rf"^(?=\[\s*{OBJECT})", re.MULTILINE)
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\](\w+))?(?:\[ARGS\])?\s*(?=\{)")


def _parse(text: str) -> list[ToolCall]:
    text = text.strip()
    if _TAG in text:
        calls = _tagged(text)
    elif match := _LIST.search(text):
        calls = json_calls(text, match.end())[0]
    else:
        calls = _named(text, 0)[0]
    # Its chat templates take ids of nine letters or digits only.
    return [replace(call, id=call.id or f"call{number:05d}") for number, call in enumerate(calls)]


def _tagged(text: str) -> list[ToolCall]:
    calls: list[ToolCall] = []
    position = text.find(_TAG)
    while position >= 0:
        start = position + len(_TAG)
        found, end = _named(text, start)
        if not found:
            found, end = json_calls(text, start)
        calls += found
        position = text.find(_TAG, end)
    return calls


def _named(text: str, position: int) -> tuple[list[ToolCall], int]:
    calls: list[ToolCall] = []
    while match := _NAMED.match(text, position):
        position = match.end()
        try:
            arguments, position = decode(text, position)
        except ValueError as error:
            return [*calls, unreadable(f"expected the arguments as a JSON object, but got {error}", match[1])], position
        calls.append(read_call(match[1], arguments, match[2] or ""))
    return calls, position


FORMAT = Format(
    marker=re.compile(rf"{re.escape(_TAG)}|{_LIST.pattern}", re.MULTILINE),
    parse=_parse,
    form=f'{_TAG} [{{"name": "NAME", "arguments": {{"ARGUMENT": VALUE}}}}]',
)
