"""An environment with limits: it cannot hold up the others, and what goes wrong in it is named."""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

from grpo_lightning.envs.environment import Environment, EnvironmentFactory, InvalidAction, Observation
from grpo_lightning.rollout.episode import Episode
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.types import Action, Task
from grpo_lightning.threads import call, described

logger = logging.getLogger(__name__)


class EnvironmentFault(Exception):
    """An environment failed, which says nothing about the policy. The message names environment, task and turn."""


class GuardedEnvironment:
    """The environment of one episode: plain methods run in threads, every call has a time limit, failures are named.

    Args:
        environment: The environment; None while it is being made.
        task: Task of the episode.
        settings: The limits.
    """

    def __init__(self, environment: Environment | None, task: Task, settings: EpisodeSettings) -> None:
        self._made = environment
        self._task = task
        self._settings = settings
        self._turn = 0

    @classmethod
    async def make(cls, factory: EnvironmentFactory, task: Task, settings: EpisodeSettings) -> Self:
        """A fresh environment.

        Raises:
            EnvironmentFault: If it cannot be made.
        """
        return cls(await cls(None, task, settings)._call("making it", factory), task, settings)

    @property
    def _environment(self) -> Environment:
        assert self._made is not None
        return self._made

    async def reset(self) -> Observation:
        """Begin the episode.

        Raises:
            EnvironmentFault: If it fails.
        """
        return self._checked("reset()", await self._call("reset()", self._environment.reset, self._task))

    async def step(self, turn: int, action: Action) -> Observation:
        """Take an action.

        Raises:
            InvalidAction: If the environment cannot read it.
            EnvironmentFault: If it fails.
        """
        self._turn = turn
        return self._checked("step()", await self._call("step()", self._environment.step, action))

    async def default_action(self) -> str:
        """The move to make in the policy's place.

        Raises:
            EnvironmentFault: If it fails.
        """
        return str(await self._call("default_action()", self._environment.default_action))

    async def score(self, episode: Episode) -> Mapping[str, float]:
        """Rewards of the whole episode.

        Raises:
            EnvironmentFault: If it fails, or one is not a finite number.
        """
        scores = await self._call("score()", self._environment.score, episode)
        if not isinstance(scores, Mapping) or not all(_is_finite(value) for value in scores.values()):
            raise self._fault(f"score() should return finite numbers by name, but returned {scores!r}")
        return {str(name): float(value) for name, value in scores.items()}

    async def close(self) -> None:
        """Release the environment; a failure to do so is only reported."""
        try:
            await self._call("close()", self._environment.close)
        except EnvironmentFault as fault:
            logger.warning("%s", fault)

    async def _call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        limit, stall = self._settings.step_timeout, self._settings.stall_warning
        running = asyncio.ensure_future(call(function, *args))
        try:
            done, _ = await asyncio.wait([running], timeout=min(limit, stall))
            if not done and stall < limit:
                logger.warning("%s: %s has been running for %g s", self._place, what, stall)
                done, _ = await asyncio.wait([running], timeout=limit - stall)
            if not done:
                raise self._fault(f"{what} took longer than {limit:g} s (episodes.step_timeout)")
            return running.result()
        except (EnvironmentFault, InvalidAction):
            raise
        except Exception as error:
            raise self._fault(f"{what} raised {described(error)}") from error
        finally:
            running.cancel()

    def _checked(self, what: str, observation: Any) -> Observation:
        if not isinstance(observation, Observation):
            raise self._fault(f"{what} should return an Observation, but returned {observation!r:.200}")
        # A prompt may hold earlier conversation. After it, what the policy said is known by its tokens.
        if what != "reset()" and any(message.get("role") == "assistant" for message in observation.messages):
            raise self._fault(f"{what} returned a message of the assistant; use forced_action to speak in its place")
        over = observation.terminated or observation.truncated
        if not observation.messages and not over:
            raise self._fault(f"{what} said nothing and did not end the episode")
        if observation.reward is not None and not _is_finite(observation.reward):
            raise self._fault(f"{what} gave a reward of {observation.reward!r}, which is no finite number")
        return observation

    @property
    def _place(self) -> str:
        name = self._task.env or ("(new)" if self._made is None else type(self._made).__name__)
        return f"environment {name}, task {self._task.id!r}, turn {self._turn}"

    def _fault(self, what: str) -> EnvironmentFault:
        return EnvironmentFault(f"{self._place}: {what}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
