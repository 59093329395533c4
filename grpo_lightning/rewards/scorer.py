"""Calling reward functions: arguments by name, a time limit, checked results, a weighted sum."""

import asyncio
import copy
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grpo_lightning.errors import ConfigurationError, RewardError
from grpo_lightning.rewards.number import finite
from grpo_lightning.rollout.episode import ENVIRONMENT_REWARD, Episode
from grpo_lightning.rollout.types import Message, Task
from grpo_lightning.threads import call, described

RewardFunction = Callable[..., Any]
"""``f(completion, **fields) -> float | None``, plain or async.

It receives the text of the last turn and, by parameter name, fields of the task's data, ``prompt`` (the task's
messages), ``task_id`` or ``episode`` (the whole `Episode`). None means that it does not apply to this task.
"""


RESERVED_NAMES = {"mean", "std", "failed", ENVIRONMENT_REWARD}
"""Names of metrics under ``reward/`` that a reward function may not have."""


@dataclass(frozen=True)
class Score:
    """What the reward functions say of one episode.

    Attributes:
        rewards: Raw value of each by name; None where it does not apply.
        total: Weighted sum of those that apply; None if none does.
        failure: Why the episode cannot be scored.
    """

    rewards: Mapping[str, float | None]
    total: float | None
    failure: str | None = None


class Scorer:
    """Several reward functions with weights.

    Args:
        functions: The reward functions; none where an environment gives all rewards.
        weights: Weight of each in the sum; 1 each if omitted.
        timeout: Seconds that one call may take.
        on_error: ``"raise"`` stops the run when a function raises or runs out of time; ``"skip"`` takes the
            completion out of its group instead, and counts it.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        weights: Sequence[float] | None = None,
        timeout: float = 30.0,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        if weights is not None and len(weights) != len(functions):
            raise ConfigurationError(f"expected one weight per reward, but got {len(weights)} for {len(functions)}")
        if not timeout > 0:
            raise ConfigurationError(f"expected a reward timeout > 0 seconds, but got {timeout}")
        reserved = sorted(set(_unique_names(functions)) & RESERVED_NAMES)
        if reserved:
            raise ConfigurationError(f"expected a reward function with another name than {', '.join(reserved)}")
        self._functions = dict(zip(_unique_names(functions), functions, strict=True))
        self.weights = dict(zip(self._functions, weights or [1.0] * len(functions), strict=True))
        self._timeout = timeout
        self._on_error = on_error

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each reward."""
        return tuple(self._functions)

    @property
    def plain_names(self) -> tuple[str, ...]:
        """Name of each reward that is computed by a plain function, not an async one."""
        return tuple(name for name, f in self._functions.items() if not _is_async(f))

    def check(self, task: Task) -> None:
        """Refuse functions that ask for a field that the tasks do not have.

        Raises:
            ConfigurationError: Naming function, parameter and the fields that there are.
        """
        for name, function in self._functions.items():
            missing = _missing_fields(name, function, task)
            if missing:
                raise ConfigurationError(
                    f"reward {name!r} asks for {', '.join(map(repr, missing))}, but the tasks have "
                    f"{', '.join(map(repr, sorted(_fields(task))))}"
                )

    def applicable(self, task: Task) -> tuple["Scorer", dict[str, list[str]]]:
        """The same without the functions that ask for a field that the task does not have.

        Returns:
            A scorer, perhaps without functions, and for each function left out the fields it misses.
        """
        missing = {name: _missing_fields(name, function, task) for name, function in self._functions.items()}
        kept = [name for name, fields in missing.items() if not fields]
        return self.only(kept), {name: fields for name, fields in missing.items() if fields}

    def only(self, names: Collection[str]) -> "Scorer":
        """The same with some of the functions, perhaps none."""
        scorer = copy.copy(self)
        scorer._functions = {name: function for name, function in self._functions.items() if name in names}
        return scorer

    def raising(self) -> "Scorer":
        """The same, but the first failure raises."""
        scorer = copy.copy(self)
        scorer._on_error = "raise"
        return scorer

    async def score(self, task: Task, episode: Episode) -> Score:
        """Call every function.

        Args:
            task: The task.
            episode: The episode, not scored yet.

        Raises:
            RewardError: If a function returns something that is no reward; if it raises or runs out of time and
                errors are not skipped.
        """
        completion = episode.text
        fields = {"episode": episode} | _fields(task)
        rewards: dict[str, float | None] = {}
        failures = []
        for name, function in self._functions.items():
            try:
                async with asyncio.timeout(self._timeout) as limit:
                    value = await _call(function, completion, fields)
            except Exception as error:
                if limit.expired():
                    failures.append(f"reward {name!r} took longer than {self._timeout:g} s on task {task.id!r}")
                    continue
                message = f"reward {name!r} raised {described(error)} on task {task.id!r}, completion {completion!r}"
                if self._on_error == "raise":
                    raise RewardError(message) from error
                failures.append(message)
                continue
            rewards[name] = _checked(name, value, task, completion)
        if failures:
            if self._on_error == "raise":
                raise RewardError(failures[0] + ". Raise reward_timeout, or set reward_errors to 'skip'.")
            return Score(rewards, None, "; ".join(failures))
        values = [self.weights[name] * value for name, value in rewards.items() if value is not None]
        return Score(rewards, math.fsum(values) if values else None)


def _is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _missing_fields(name: str, function: RewardFunction, task: Task) -> list[str]:
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters:
        raise ConfigurationError(f"expected reward {name!r} to take the completion, but it takes no argument")
    fields = {*_fields(task), "episode"}
    return [
        p.name
        for p in parameters[1:]
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in fields
    ]


async def _call(function: RewardFunction, completion: str, fields: Mapping[str, Any]) -> Any:
    first, *parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        arguments = {name: value for name, value in fields.items() if name != first.name}
    else:
        arguments = {p.name: fields[p.name] for p in parameters if p.name in fields}
    return await call(function, completion, **arguments)


def _fields(task: Task) -> dict[str, Any]:
    prompt: tuple[Message, ...] = task.messages
    return {"prompt": prompt, "task_id": task.id, **task.data}


def _checked(name: str, value: Any, task: Task, completion: str) -> float | None:
    if value is None:
        return None
    number = finite(value)
    if number is None:
        raise RewardError(
            f"expected reward {name!r} to return a finite number or None, but got {value!r} "
            f"on task {task.id!r}, completion {completion!r}"
        )
    return number


def metric_name(name: str) -> str:
    """A reward's name as all loggers take it: some refuse characters such as those of ``<lambda>``."""
    return "_".join(re.findall(r"\w+", name, re.ASCII)) or "reward"


def _unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        name = metric_name(getattr(function, "__name__", None) or type(function).__name__)
        number = 2
        unique = name
        while unique in names:
            unique = f"{name}_{number}"
            number += 1
        names.append(unique)
    return names
