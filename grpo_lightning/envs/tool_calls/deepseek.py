"""DeepSeek V3 and V3.1: calls between ``<｜tool▁call▁begin｜>`` and ``<｜tool▁call▁end｜>``."""

import re

from grpo_lightning.envs.tool_calls.reading import Format, cut_off, read_call, unreadable
from grpo_lightning.rollout.types import ToolCall

_OPEN = "<｜tool▁call▁begin｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_CLOSE = "<｜tool▁call▁end｜>"


def _parse(text: str) -> list[ToolCall]:
    calls: list[ToolCall] = []
    position = text.find(_OPEN)
    while position >= 0:
        close = text.find(_CLOSE, position)
        if close < 0:
            return [*calls, cut_off(_CLOSE)]
        calls.append(_call(text[position + len(_OPEN) : close]))
        position = text.find(_OPEN, close)
    return calls


def _call(body: str) -> ToolCall:
    head, separator, rest = body.partition(_SEPARATOR)
    if not separator:
        return unreadable(f"expected NAME{_SEPARATOR}ARGUMENTS, but got {body[:100]!r}")
    if rest.lstrip().startswith("{"):
        return read_call(head.strip(), rest)
    # V3 puts the word "function" first, and the arguments into a fenced block after the name.
    name, _, block = rest.strip().partition("\n")
    return read_call(name.strip(), block.strip().removeprefix("```json").removesuffix("```"))


FORMAT = Format(
    marker=re.compile(_OPEN),
    parse=_parse,
    form=f'{_OPEN}NAME{_SEPARATOR}{{"ARGUMENT": VALUE}}{_CLOSE}',
)
