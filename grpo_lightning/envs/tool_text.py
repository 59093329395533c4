"""Tools for chat templates that know nothing of them: described in the system message, answered by user messages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_lightning.envs.tool_calls import FORMATS, ToolFormat
from grpo_lightning.rollout.types import Message

_ANSWER = "<tool_response>\n{}\n</tool_response>"


def tools_as_text(schemas: Sequence[Mapping[str, Any]], format: ToolFormat = "auto") -> str:
    """What tools there are and how to call them, in words for the policy.

    Args:
        schemas: JSON schemas in the OpenAI shape.
        format: How calls are to be written; ``"auto"`` asks for the Hermes format.
    """
    described = "\n".join(json.dumps(schema.get("function", schema), ensure_ascii=False) for schema in schemas)
    form = FORMATS["hermes" if format == "auto" else format].form
    return (
        f"You can call these functions:\n{described}\n\n"
        f"To call a function, write its name and its arguments like this:\n{form}\n\n"
        f"You then get the result like this:\n{_ANSWER.format('RESULT')}\n\n"
        "When you know the answer, give it without calling a function."
    )


def with_tools_in_system(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], format: ToolFormat = "auto"
) -> tuple[Message, ...]:
    """The messages with `tools_as_text` at the end of the system message, or as one.

    Args:
        messages: Begin of a conversation, after any default system prompt was put in.
        tools: JSON schemas in the OpenAI shape; without any, the messages stay as they are.
        format: How calls are to be written.
    """
    if not tools:
        return tuple(messages)
    text = tools_as_text(tools, format)
    if not messages or messages[0]["role"] != "system":
        return ({"role": "system", "content": text}, *messages)
    system, *others = messages
    content = system["content"]
    joined = f"{content}\n\n{text}" if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return ({**system, "content": joined}, *others)


def without_tool_role(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with each run of tool messages as one user message, since templates may want roles to alternate."""
    result: list[Message] = []
    previous = ""
    for message in messages:
        role = message["role"]
        if role == "tool":
            text = _ANSWER.format(message["content"])
            if previous == "tool":
                text = f"{result.pop()['content']}\n{text}"
            message = {"role": "user", "content": text}
        result.append(message)
        previous = role
    return tuple(result)
