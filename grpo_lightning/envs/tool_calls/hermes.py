"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen2.5, Qwen3, SmolLM2."""

import re

from grpo_lightning.envs.tool_calls import llama3
from grpo_lightning.envs.tool_calls.reading import Format, cut_off, json_calls, unreadable
from grpo_lightning.rollout.types import ToolCall

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"


def _parse(text: str) -> list[ToolCall]:
    if _OPEN not in text:
        return llama3.FORMAT.parse(text)
    calls: list[ToolCall] = []
    position = text.find(_OPEN)
    while position >= 0:
        found, end = json_calls(text, start := position + len(_OPEN))
        close = text.find(_CLOSE, end)
        if close < 0:
            return [*calls, cut_off(_CLOSE, found[0].name if found else "")]
        rest = text[end:close].strip()
        if rest and end > start and found and not any(call.error for call in found):
            found = [unreadable(f"expected {_CLOSE} after the call, but got {rest[:100]!r}", found[0].name)]
        calls += found
        position = text.find(_OPEN, close)
    return calls


FORMAT = Format(
    marker=re.compile(rf"{_OPEN}(?!\s*<function=)"),
    parse=_parse,
    form=f'{_OPEN}\n{{"name": "NAME", "arguments": {{"ARGUMENT": VALUE}}}}\n{_CLOSE}',
)
