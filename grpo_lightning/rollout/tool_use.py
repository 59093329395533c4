"""How the tools of an environment are shown to the policy, and how its calls are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from grpo_lightning.envs.environment import Observation
from grpo_lightning.envs.tool_calls import ToolFormat, parse_tool_calls
from grpo_lightning.envs.tool_text import with_tools_in_system, without_tool_role
from grpo_lightning.rollout.prompts import PromptEncoder
from grpo_lightning.rollout.types import Message, ToolCall


@dataclass(frozen=True)
class ToolUse:
    """The tools of one episode.

    Attributes:
        schemas: JSON schemas in the OpenAI shape; none where the environment offers no tools.
        format: How calls are written.
        by_template: Whether the chat template shows tools and their results; otherwise the system message describes
            them, and results come as messages of the user.
    """

    schemas: tuple[Mapping[str, Any], ...]
    format: ToolFormat
    by_template: bool

    @classmethod
    def of(cls, observation: Observation, encoder: PromptEncoder) -> Self:
        """The tools that an environment offers at the start of an episode."""
        tools = observation.tools
        return cls(tools, observation.tool_format, not tools or encoder.shows_tools(tools))

    @property
    def for_template(self) -> tuple[Mapping[str, Any], ...]:
        """What to give to the chat template."""
        return self.schemas if self.by_template else ()

    def opening(self, messages: Sequence[Message], encoder: PromptEncoder) -> tuple[Message, ...]:
        """The first messages as the template should see them."""
        if self.by_template:
            return tuple(messages)
        return with_tools_in_system(encoder.with_system_prompt(messages), self.schemas, self.format)

    def observed(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Later messages as the template should see them."""
        return tuple(messages) if self.by_template else without_tool_role(messages)

    def calls(self, text: str) -> tuple[ToolCall, ...]:
        """The calls in what the policy said; none where there are no tools."""
        return parse_tool_calls(text, self.format) if self.schemas else ()
