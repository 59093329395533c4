"""What an environment is: it says something, the policy acts, it says something new, until it ends."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo_lightning.envs.tool_calls import ToolFormat
from grpo_lightning.rollout.types import Action, Message, Task

if TYPE_CHECKING:
    from grpo_lightning.rollout.episode import Episode


@dataclass(frozen=True)
class Observation:
    """What an environment says: at the start of an episode, or in answer to an action.

    Attributes:
        messages: What is new, in the OpenAI chat shape; never messages of the assistant.
        tools: JSON schemas of the tools that may be called, in the OpenAI shape; on reset only.
        tool_format: How calls of them are written; told by the markers in the text by default.
        reward: What the last action earned; None, on reset, if this environment leaves rewards to `Environment.score`
            and reward functions.
        terminated: Whether the episode is over.
        truncated: Whether it was cut off before it was over.
        error: What was wrong with the last action (a bad call of a tool, say), as the messages tell the policy;
            counted.
        forced_action: Text of the next action, which is then not the policy's: a scripted opening, a default move.
        info: Anything else worth keeping: plain values, shown with the episode.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_format: ToolFormat = "auto"
    reward: float | None = 0.0
    terminated: bool = False
    truncated: bool = False
    error: str | None = None
    forced_action: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


class InvalidAction(Exception):
    """Raised by `Environment.step` for an action that it cannot read; the environment's state must be as before.

    What happens then is the user's choice (`EpisodeSettings.invalid_action`).

    Args:
        message: What is wrong and what is expected, in words for the policy.
        reward: What the action earns, usually 0 or less; None if this environment leaves rewards to reward functions.
    """

    def __init__(self, message: str, reward: float | None = 0.0) -> None:
        super().__init__(message)
        self.message = message
        self.reward = reward


class Environment(ABC):
    """One episode's world. A fresh one is made for every episode and closed when it ends, however it ends.

    Methods may be ``async`` or plain; plain ones are called in a thread, so they may block. An exception other than
    `InvalidAction` is a fault of the infrastructure: the episode is begun again from its seed, and after the last
    attempt it is left out of its group. Raise none for what the policy did wrong.

    Subclasses implement `reset` and `step`. A single question with a reward function is the case in which the first
    `step` ends the episode.
    """

    @abstractmethod
    def reset(self, task: Task) -> Observation | Awaitable[Observation]:
        """Begin the episode of a task. The same task must give the same observation."""

    @abstractmethod
    def step(self, action: Action) -> Observation | Awaitable[Observation]:
        """Take an action.

        Raises:
            InvalidAction: If the action cannot be read.
        """

    def default_action(self) -> str | Awaitable[str]:
        """Text of the move to make in the policy's place after an invalid one, where the user chose that."""
        raise NotImplementedError(f"{type(self).__name__} has no default action")

    def score(self, episode: "Episode") -> Mapping[str, float] | Awaitable[Mapping[str, float]]:
        """Rewards of the whole episode by name, on top of those of its turns."""
        return {}

    def close(self) -> Awaitable[None] | None:
        """Release everything. Called once, in any state, also if `reset` failed."""
        return None


EnvironmentFactory = Callable[[], Environment]
"""Makes the environment of one episode: a class, a ``functools.partial`` of one, or any function."""


class SingleTurn(Environment):
    """The simplest environment: the task's messages, one answer, and rewards from reward functions."""

    async def reset(self, task: Task) -> Observation:
        """The task's messages."""
        return Observation(task.messages, reward=None)

    async def step(self, action: Action) -> Observation:
        """The end."""
        return Observation(reward=None, terminated=True)
