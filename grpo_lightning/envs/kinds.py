"""Which environment a task is played in."""

from collections import defaultdict
from collections.abc import Mapping

from grpo_lightning.envs.environment import EnvironmentFactory, SingleTurn
from grpo_lightning.errors import ConfigurationError


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
    if not isinstance(environment, dict):
        return defaultdict(lambda: environment, {"": environment})
    for name, factory in environment.items():
        if not callable(factory):
            raise ConfigurationError(f"expected environment {name!r} to be a class or a function, but got {factory!r}")
    return environment
