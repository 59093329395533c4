"""``{"name": ..., "parameters": {...}}`` with or without ``<|python_tag|>``: Llama 3.

Also what is left of the Hermes format where its markers were special tokens.
"""

import re

from grpo_lightning.envs.tool_calls.reading import OBJECT, Format, json_calls
from grpo_lightning.rollout.types import ToolCall

_TAG = "<|python_tag|>"
_FIRST = re.compile(rf"^(?={OBJECT})", re.MULTILINE)
_NEXT = re.compile(rf"[\s;,]*(?={OBJECT})")


def _parse(text: str) -> list[ToolCall]:
    _, tag, tagged = text.partition(_TAG)
    text = (tagged if tag else text).strip()
    if tag and not text.startswith("{"):
        return json_calls(text, 0)[0]
    calls: list[ToolCall] = []
    match = re.match("", text) if tag else _FIRST.search(text)
    while match:
        start = match.end()
        found, end = json_calls(text, start)
        calls += found
        match = None if end == start else _NEXT.match(text, end) or _FIRST.search(text, end)
    return calls


FORMAT = Format(
    marker=re.compile(rf"{re.escape(_TAG)}|{_FIRST.pattern}", re.MULTILINE),
    parse=_parse,
    form='{"name": "NAME", "parameters": {"ARGUMENT": VALUE}}',
)
