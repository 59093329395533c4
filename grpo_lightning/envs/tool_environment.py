"""Episodes in which the policy may call tools before it answers."""

import time
from collections.abc import Callable
from typing import Any, get_args

from grpo_lightning.envs.environment import Environment, Observation
from grpo_lightning.envs.tool_calls import ToolFormat
from grpo_lightning.envs.tools import ToolSet
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Task


class ToolEnvironment(Environment):
    """A task and tools: calls are answered with their results; a turn without calls is the answer and the end.

    A call that cannot be read, of an unknown tool, with wrong arguments, or that fails or takes too long, is answered
    with what was wrong. Reward functions judge the answer.

    A subclass with tools that share a state passes its own methods: ``super().__init__([self.push, self.pop])``. Every
    episode has an environment of its own.

    Args:
        tools: Functions with type hints and a docstring that describes each parameter under ``Args:``. In YAML, import
            paths.
        tool_format: How the policy writes calls. By default told by the markers in its text.
        tool_timeout: Seconds that the calls of one turn may take together; they run one after the other. Keep it well
            below ``step_timeout`` of the episodes.
        max_result_length: Longest result of a call in characters; a longer one is cut.

    Raises:
        ConfigurationError: If a tool lacks type hints or docstring, or there is no such format.
    """

    def __init__(
        self,
        tools: list[Callable[..., Any]],
        *,
        tool_format: ToolFormat = "auto",
        tool_timeout: float = 10.0,
        max_result_length: int = 2000,
    ) -> None:
        if tool_format not in get_args(ToolFormat):
            known = ", ".join(map(repr, get_args(ToolFormat)))
            raise ConfigurationError(f"expected tool_format to be one of {known}, but got {tool_format!r}")
        self._format = tool_format
        self._tools = ToolSet(tools, timeout=tool_timeout, max_result_length=max_result_length)
        self._timeout = tool_timeout

    async def reset(self, task: Task) -> Observation:
        """The task's messages and the tools."""
        return Observation(task.messages, tools=self._tools.schemas, tool_format=self._format, reward=None)

    async def step(self, action: Action) -> Observation:
        """The results of the calls; without any, the end."""
        calls = action.tool_calls
        if not calls:
            return Observation(reward=None, terminated=True)
        end = time.monotonic() + self._timeout
        results = [await self._tools.call(call, timeout=max(end - time.monotonic(), 0.0)) for call in calls]
        errors = [result.content for result in results if result.error]
        return Observation(
            tuple(
                {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": result.content}
                for call, result in zip(calls, results, strict=True)
            ),
            reward=None,
            error="\n".join(errors) or None,
            info={"tool_calls": len(calls), "tool_errors": len(errors)},
        )
