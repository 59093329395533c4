"""Trying an environment once before anything expensive starts."""

from collections import defaultdict
from collections.abc import Mapping

from grpo_lightning.envs.environment import EnvironmentFactory, Observation
from grpo_lightning.envs.kinds import factory_for
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.guarded_environment import EnvironmentFault, GuardedEnvironment
from grpo_lightning.rollout.loop import EventLoopThread
from grpo_lightning.rollout.prompts import PromptEncoder
from grpo_lightning.rollout.tool_use import ToolUse
from grpo_lightning.rollout.types import Task
from grpo_lightning.tasks import TaskSource

_LOOKED_AT = 2000


def probe(
    environments: Mapping[str, EnvironmentFactory], tasks: TaskSource, encoder: PromptEncoder, settings: EpisodeSettings
) -> None:
    """Begin one episode of each environment, and try the chat template on what it says.

    Args:
        environments: How environments are made, by `Task.env`.
        tasks: The tasks; the first of each environment is begun, among up to 2,000 that are looked at.
        encoder: The chat, in tokens.
        settings: Limits and choices.

    Raises:
        ConfigurationError: If there is no such environment, it does not begin, lacks the default action that it will
            be asked for, or the template cannot hold several turns.
    """
    # Where there is one environment for all tasks, what they ask for makes no difference.
    looked_at = 1 if isinstance(environments, defaultdict) else min(len(tasks), _LOOKED_AT)
    found: dict[str, Task] = {}
    for i in range(looked_at):
        task = tasks[i * len(tasks) // looked_at]
        found.setdefault(task.env, task)
    factories = [(factory_for(environments, task), task) for task in found.values()]
    for factory, task in factories:
        _probe(factory, task, encoder, settings)


def _probe(factory: EnvironmentFactory, task: Task, encoder: PromptEncoder, settings: EpisodeSettings) -> None:
    loop = EventLoopThread("grpo-lightning-probe")
    try:
        observation = loop.run(_first_observation(factory, task, settings))
    except EnvironmentFault as fault:
        raise ConfigurationError(str(fault)) from fault
    finally:
        loop.close()
    tools = ToolUse.of(observation, encoder)
    encoder.prompt(task.id, tools.opening(observation.messages, encoder), tools.for_template)
    if settings.max_turns > 1:
        encoder.check_turns(tools.for_template, ("user", "tool") if tools.for_template else ("user",))


async def _first_observation(factory: EnvironmentFactory, task: Task, settings: EpisodeSettings) -> Observation:
    environment = await GuardedEnvironment.make(factory, task, settings)
    try:
        observation = await environment.reset()
        if settings.invalid_action == "default":
            await environment.default_action()
        return observation
    finally:
        await environment.close()
