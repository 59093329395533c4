"""``<function=name><parameter=x>value</parameter></function>``, within ``<tool_call>`` or not: Qwen3-Coder.

Values are plain text here; the tool's schema says what they are.
"""

import re

from grpo_lightning.envs.tool_calls.reading import Format, cut_off, read_call, unreadable
from grpo_lightning.rollout.types import ToolCall

_OPEN = "<function="
_CLOSE = "</function>"
_PARAMETER = "<parameter="
_END = "</parameter>"


def _parse(text: str) -> list[ToolCall]:
    calls: list[ToolCall] = []
    position = text.find(_OPEN)
    while position >= 0:
        close = text.find(_CLOSE, position)
        name, _, body = text[position + len(_OPEN) : close if close >= 0 else len(text)].partition(">")
        if close < 0:
            return [*calls, cut_off(_CLOSE, name if body else "")]
        calls.append(_call(name.strip(), body))
        position = text.find(_OPEN, close)
    return calls


def _call(name: str, body: str) -> ToolCall:
    before, *parameters = body.split(_PARAMETER)
    if not name or before.strip():
        return unreadable(f"expected {_OPEN}NAME>{_PARAMETER}ARGUMENT>..., but got {before.strip()[:100]!r}", name)
    arguments = {}
    for parameter in parameters:
        key, _, rest = parameter.partition(">")
        value, end, after = rest.partition(_END)
        if not end or after.strip():
            return unreadable(f"expected {_END} at the end of {key[:100]!r} and nothing between arguments", name)
        arguments[key.strip()] = value.removeprefix("\n").removesuffix("\n")
    return read_call(name, arguments)


FORMAT = Format(
    marker=re.compile(_OPEN),
    parse=_parse,
    form=f"<tool_call>\n{_OPEN}NAME>\n{_PARAMETER}ARGUMENT>\nVALUE\n{_END}\n{_CLOSE}\n</tool_call>",
)
