"""Tasks that are nothing but seeds: for games, which make their own beginnings."""

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Task


class SeedTasks:
    """One task per seed, for environments that draw their start from ``task.seed``.

    Args:
        size: How many tasks.
        seed: Seed of the first task; the others follow. Two sources share no task if their seeds do not overlap.
        env: Name of the environment, where there are several.
        messages: Chat messages that every episode begins with, before the environment's own: a system prompt, say.
        data: Further values of every task, for reward functions and environments.

    Raises:
        ConfigurationError: If there would be no tasks, or a negative seed.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        env: str = "",
        messages: Sequence[dict[str, str]] = (),
        data: Mapping[str, Any] | None = None,
    ) -> None:
        if size < 1:
            raise ConfigurationError(f"expected size >= 1, but got {size}")
        if seed < 0:
            raise ConfigurationError(f"expected seed >= 0, because not all environments take others, but got {seed}")
        self._seeds = range(seed, seed + size)
        self._env = env
        self._messages = tuple(messages)
        self._data = dict(data or {})

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(index)
        seed = self._seeds[index]
        return Task(id=f"seed-{seed}", messages=self._messages, data=dict(self._data), seed=seed, env=self._env)
