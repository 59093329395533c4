"""Which environment a task is played in."""

from collections import defaultdict
from collections.abc import Mapping

from grpo_lightning.envs.environment import EnvironmentFactory, SingleTurn
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Task


def as_environments(
    environment: EnvironmentFactory | dict[str, EnvironmentFactory] | None,
) -> Mapping[str, EnvironmentFactory]:
    """How environments are made, by `Task.env`.

    Raises:
        ConfigurationError: If something given makes no environments.
    """
    if environment is None:
        # Tasks may say what they like: there is one way to answer them.
        return defaultdict(lambda: SingleTurn)
    named = environment if isinstance(environment, dict) else defaultdict(lambda: environment, {"": environment})
    for name, factory in named.items():
        if not callable(factory):
            raise ConfigurationError(
                f"expected environment {name!r} to be a class or a function that makes one for each episode, but got "
                f"{factory!r:.200}"
            )
    return named


def factory_for(environments: Mapping[str, EnvironmentFactory], task: Task) -> EnvironmentFactory:
    """How the environment of a task is made.

    Raises:
        ConfigurationError: If there is none of that name.
    """
    try:
        return environments[task.env]
    except KeyError:
        known = ", ".join(map(repr, environments)) or "none"
        raise ConfigurationError(
            f"task {task.id!r}: expected its env to be the name of an environment, but it is {task.env!r} and there "
            f"are {known}; add it to the dictionary that is given as environment"
        ) from None
