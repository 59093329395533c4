"""Environments in TRL's convention: an object whose methods are tools."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from grpo_lightning.envs.adapter import imported
from grpo_lightning.envs.environment import Observation
from grpo_lightning.envs.tool_calls import ToolFormat
from grpo_lightning.envs.tool_environment import ToolEnvironment
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Message, Task
from grpo_lightning.threads import call

if TYPE_CHECKING:
    from grpo_lightning.rollout.episode import Episode

_NO_TOOLS = ("reset", "get_reward")


class TRLEnvironment(ToolEnvironment):
    """What TRL's ``GRPOTrainer`` takes as ``environment_factory``, with an object of its own for every episode.

    The object's public methods are the tools, with type hints and docstrings; ``reset(**row)`` is given the task's
    data and its messages as ``prompt``, and may return a text, which is added to the last message. If there is a
    ``get_reward()``, its value is a reward named after the class; reward functions add to it.

    Args:
        factory: What makes the object, usually its class; in YAML its import path.
        tool_format: How the policy writes calls. By default told by the markers in its text.
        tool_timeout: Seconds that the calls of one turn may take together.
        max_result_length: Longest result of a call in characters; a longer one is cut.

    Raises:
        ConfigurationError: If the object has no ``reset``, or a method lacks type hints or docstring.
    """

    def __init__(
        self,
        factory: str | Callable[[], Any],
        *,
        tool_format: ToolFormat = "auto",
        tool_timeout: float = 10.0,
        max_result_length: int = 2000,
    ) -> None:
        self._inner = imported("factory", factory)()
        self._name = type(self._inner).__name__
        # Of the class: properties of the object are not read.
        methods = [name for name, _ in inspect.getmembers(type(self._inner), inspect.isfunction)]
        if "reset" not in methods:
            raise ConfigurationError(f"expected {self._name} to have a method reset(**row), but there is none")
        self._pays = "get_reward" in methods
        super().__init__(
            [getattr(self._inner, name) for name in methods if not name.startswith("_") and name not in _NO_TOOLS],
            tool_format=tool_format,
            tool_timeout=tool_timeout,
            max_result_length=max_result_length,
        )

    async def reset(self, task: Task) -> Observation:
        """The task's messages, with what the object's ``reset`` adds, and the tools."""
        prompt = [dict(message) for message in task.messages] or [{"role": "user", "content": ""}]
        text = await call(self._inner.reset, **{**task.data, "prompt": prompt})
        if text is not None and not isinstance(text, str):
            raise ConfigurationError(f"expected {self._name}.reset() to return a text or None, but got {text!r:.200}")
        opening: tuple[Message, ...] = tuple(prompt)
        if text is not None:
            opening = (*opening[:-1], {**opening[-1], "content": opening[-1]["content"] + text})
        return Observation(opening, tools=self._tools.schemas, tool_format=self._format, reward=None)

    async def score(self, episode: "Episode") -> Mapping[str, float]:
        """The object's own reward, if it gives one."""
        if not self._pays:
            return {}
        return {self._name: float(await call(self._inner.get_reward))}
