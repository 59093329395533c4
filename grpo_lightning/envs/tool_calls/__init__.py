"""Reading calls of tools out of what a policy said. A new format is one module with a `Format` and one entry below."""

from dataclasses import replace
from typing import Literal

from grpo_lightning.envs.tool_calls import deepseek, fenced, hermes, llama3, mistral, pythonic, qwen3_coder
from grpo_lightning.envs.tool_calls.reading import Format
from grpo_lightning.rollout.types import ToolCall

__all__ = ["FORMATS", "Format", "ToolFormat", "parse_tool_calls"]

ToolFormat = Literal["auto", "hermes", "qwen3_coder", "llama3", "mistral", "pythonic", "fenced", "deepseek"]
"""How calls are written; ``"auto"`` tells by the markers in the text."""

FORMATS: dict[str, Format] = {
    "hermes": hermes.FORMAT,
    "qwen3_coder": qwen3_coder.FORMAT,
    "llama3": llama3.FORMAT,
    "mistral": mistral.FORMAT,
    "pythonic": pythonic.FORMAT,
    "fenced": fenced.FORMAT,
    "deepseek": deepseek.FORMAT,
}


def parse_tool_calls(text: str, format: ToolFormat = "auto") -> tuple[ToolCall, ...]:
    """The calls of tools in a completion, in order. Never raises, whatever the text.

    What stands before ``</think>`` is thinking, not calls.

    The text may have been decoded without special tokens. ``<tool_call>``, ``<|python_tag|>`` and ``[TOOL_CALLS]``
    may therefore be missing: a JSON object that begins a line with a name and arguments, or a list of them, counts as
    a call without any marker. Where newer Mistral models lose theirs, ``name{...}`` is left, which is read with
    ``format="mistral"`` only.

    Args:
        text: The completion.
        format: How calls are written. ``"auto"`` takes the format whose marker comes first and is cautious: prose,
            formulas and JSON answers are no calls.

    Returns:
        The calls, each with an id of its own; empty if there is none. A call that is there but cannot be read, or is
        cut off, has an ``error``.
    """
    before, closed, after = text.partition("</think>")
    if closed:
        text = after
    elif "<think>" in before:
        return ()
    text = text.strip()
    return _with_own_ids(_recognised(text) if format == "auto" else FORMATS[format].parse(text))


def _recognised(text: str) -> list[ToolCall]:
    matches = [(match.start(), form) for form in FORMATS.values() if (match := form.marker.search(text))]
    for _, form in sorted(matches, key=lambda match: match[0]):
        if calls := form.parse(text):
            return calls
    return []


def _with_own_ids(calls: list[ToolCall]) -> tuple[ToolCall, ...]:
    given = {call.id for call in calls}
    free = (name for number in range(2 * len(calls)) if (name := f"call_{number}") not in given)
    used: set[str] = set()
    result = []
    for call in calls:
        own = call.id if call.id and call.id not in used else next(free)
        used.add(own)
        result.append(replace(call, id=own))
    return tuple(result)
