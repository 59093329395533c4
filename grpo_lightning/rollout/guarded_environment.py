"""An environment with limits: it cannot hold up the others, and what goes wrong in it is named."""

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Self

from grpo_lightning.envs.environment import Environment, EnvironmentFactory, InvalidAction, Observation
from grpo_lightning.rewards.number import finite
from grpo_lightning.rollout.episode import Episode
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.observed import ObservationError, observed
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
            EnvironmentFault: If it cannot be made, or is no `Environment`.
        """
        unmade = cls(None, task, settings)
        abandoned = threading.Event()
        try:
            made = await unmade._call("making it", partial(_make, factory, abandoned))
        except EnvironmentFault:
            abandoned.set()
            raise
        if not isinstance(made, Environment):
            raise unmade._fault(
                f"expected a factory that returns an Environment, but {factory!r:.100} returned {made!r:.100}; give a "
                "subclass of grpo_lightning.envs.Environment, or a function that returns one"
            )
        return cls(made, task, settings)

    @property
    def environment(self) -> Environment:
        """What is guarded."""
        assert self._made is not None
        return self._made

    async def reset(self) -> Observation:
        """Begin the episode.

        Raises:
            EnvironmentFault: If it fails.
        """
        return self._checked("reset()", await self._call("reset()", self.environment.reset, self._task))

    async def step(self, turn: int, action: Action) -> Observation:
        """Take an action.

        Raises:
            InvalidAction: If the environment cannot read it.
            EnvironmentFault: If it fails.
        """
        self._turn = turn
        try:
            return self._checked(
                "step()", await self._call("step()", self.environment.step, action, may=(InvalidAction,))
            )
        except InvalidAction as invalid:
            reward = invalid.reward if invalid.reward is None else finite(invalid.reward)
            if reward is None and invalid.reward is not None:
                raise self._fault(
                    f"step() raised InvalidAction with a reward of {invalid.reward!r}, which is no finite number"
                ) from invalid
            raise InvalidAction(str(invalid.message), reward) from invalid

    async def default_action(self) -> str:
        """The move to make in the policy's place.

        Raises:
            EnvironmentFault: If it fails, or returns no text.
        """
        move = await self._call("default_action()", self.environment.default_action)
        if not isinstance(move, str):
            raise self._fault(f"default_action() should return a text, but returned {move!r:.200}")
        return move

    async def score(self, episode: Episode) -> Mapping[str, float]:
        """Rewards of the whole episode.

        Raises:
            EnvironmentFault: If it fails, or one is not a finite number.
        """
        scores = await self._call("score()", self.environment.score, episode)
        found = {str(k): finite(v) for k, v in scores.items()} if isinstance(scores, Mapping) else {"": None}
        numbers = {name: value for name, value in found.items() if value is not None}
        if len(numbers) < len(found):
            raise self._fault(f"score() should return finite numbers by name, but returned {scores!r:.200}")
        return numbers

    async def close(self) -> None:
        """Release the environment; a failure to do so is only reported."""
        try:
            await self._call("close()", self.environment.close)
        except EnvironmentFault as fault:
            logger.warning("%s", fault)

    async def _call(
        self, what: str, function: Callable[..., Any], *args: Any, may: tuple[type[Exception], ...] = ()
    ) -> Any:
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
        except Exception as error:
            if isinstance(error, (EnvironmentFault, *may)):
                raise
            raise self._fault(f"{what} raised {described(error)}") from error
        finally:
            running.cancel()

    def _checked(self, what: str, observation: Any) -> Observation:
        try:
            return observed(observation, opening=what == "reset()")
        except ObservationError as wrong:
            raise self._fault(f"{what} {wrong}") from wrong
        except Exception as error:
            raise self._fault(f"{what} returned an Observation that cannot be read: {described(error)}") from error

    @property
    def _place(self) -> str:
        name = self._task.env or ("(new)" if self._made is None else type(self._made).__name__)
        return f"environment {name}, task {self._task.id!r}, turn {self._turn}"

    def _fault(self, what: str) -> EnvironmentFault:
        return EnvironmentFault(f"{self._place}: {what}")


def _make(factory: EnvironmentFactory, abandoned: threading.Event) -> Any:
    """Make an environment, and close it if nobody waits for it any more."""
    made = factory()
    if abandoned.is_set() and isinstance(made, Environment):
        closed = made.close()
        if inspect.isawaitable(closed):
            asyncio.run(_awaited(closed))
    return made


async def _awaited(closing: Awaitable[None]) -> None:
    await closing
