"""What an environment said, checked and in plain values: environments are other people's code."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from grpo_lightning.envs.environment import Observation
from grpo_lightning.envs.tool_calls import ToolFormat
from grpo_lightning.rewards.number import finite
from grpo_lightning.rollout.plain import plain
from grpo_lightning.rollout.types import Message


class ObservationError(ValueError):
    """What is wrong with an observation, in words that follow the name of the method."""


def observed(said: Any, opening: bool = False) -> Observation:
    """An observation as it was at this moment: the environment may change its own objects afterwards.

    Args:
        said: What the environment returned.
        opening: Whether the episode begins with it. Then it may hold earlier conversation; later, what the assistant
            said is known by its tokens.

    Raises:
        ObservationError: If it is no observation, or has a part of the wrong kind.
    """
    if not isinstance(said, Observation):
        raise ObservationError(f"should return an Observation, but returned {said!r:.200}")
    messages = _messages(said.messages, opening)
    if not messages and not said.terminated and not said.truncated:
        raise ObservationError("said nothing and did not end the episode")
    reward = said.reward if said.reward is None else finite(said.reward)
    if reward is None and said.reward is not None:
        raise ObservationError(f"gave a reward of {said.reward!r:.200}, which is no finite number")
    for name in ("error", "forced_action"):
        value = getattr(said, name)
        if not isinstance(value, str | None):
            raise ObservationError(f"should return a text or None as {name}, but returned {value!r:.200}")
    if said.tool_format not in get_args(ToolFormat):
        known = ", ".join(map(repr, get_args(ToolFormat)))
        raise ObservationError(f"should return one of {known} as tool_format, but returned {said.tool_format!r:.200}")
    if not isinstance(said.info, Mapping):
        raise ObservationError(f"should return a mapping as info, but returned {said.info!r:.200}")
    return replace(
        said,
        messages=messages,
        tools=_mappings("tools", said.tools or ()),
        reward=reward,
        terminated=bool(said.terminated),
        truncated=bool(said.truncated),
        info=plain(said.info),
    )


def _messages(messages: Any, opening: bool) -> tuple[Message, ...]:
    for message in _mappings("messages", messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str | list | tuple):
            raise ObservationError(
                'should return messages like {"role": "user", "content": "..."}, but one of them is '
                f"{dict(message)!r:.200}"
            )
        if message["role"] == "assistant" and not opening:
            raise ObservationError("returned a message of the assistant; use forced_action to speak in its place")
    plain_messages = tuple(plain(message) for message in messages)
    # Half of a surrogate pair would fail in the tokenizer, where nobody knows whose text it is.
    json.dumps(plain_messages, ensure_ascii=False).encode()
    return plain_messages


def _mappings(name: str, values: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(values, list | tuple) or not all(isinstance(value, Mapping) for value in values):
        raise ObservationError(f"should return a tuple of mappings as {name}, but returned {values!r:.200}")
    return tuple(values)
