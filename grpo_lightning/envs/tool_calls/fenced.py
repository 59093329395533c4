"""A fenced block, ``json`` or ``tool``, that holds a call or a list of calls."""

import re

from grpo_lightning.envs.tool_calls.reading import OBJECT, Format, cut_off, json_calls, unreadable
from grpo_lightning.rollout.types import ToolCall

_FENCE = "```"
# A block of JSON may well be an answer; it is a call if it begins like one.
_OPEN = re.compile(
    rf"^{_FENCE}(?:(?:tool|tool_call|tool_calls)[ \t]*\n|json[ \t]*\n(?=\s*(?:\[\s*)?{OBJECT}))", re.MULTILINE
)


def _parse(text: str) -> list[ToolCall]:
    calls: list[ToolCall] = []
    match = _OPEN.search(text)
    while match:
        found, end = json_calls(text, start := match.end())
        close = text.find(_FENCE, end)
        if close < 0:
            return [*calls, cut_off(_FENCE, found[0].name if found else "")]
        rest = text[end:close].strip()
        if rest and end > start and found:
            found = [unreadable(f"expected {_FENCE} after the call, but got {rest[:100]!r}", found[0].name)]
        calls += found
        match = _OPEN.search(text, close + len(_FENCE))
    return calls


FORMAT = Format(
    marker=_OPEN,
    parse=_parse,
    form=f'{_FENCE}tool\n{{"name": "NAME", "arguments": {{"ARGUMENT": VALUE}}}}\n{_FENCE}',
)
