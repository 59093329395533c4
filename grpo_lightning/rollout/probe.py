"""Trying an environment once before anything expensive starts."""

from collections.abc import Mapping

from grpo_lightning.envs.environment import EnvironmentFactory, Observation
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.guarded_environment import EnvironmentFault, GuardedEnvironment
from grpo_lightning.rollout.loop import EventLoopThread
from grpo_lightning.rollout.prompts import PromptEncoder
from grpo_lightning.rollout.tool_use import ToolUse
from grpo_lightning.rollout.types import Task


def probe(
    environments: Mapping[str, EnvironmentFactory], task: Task, encoder: PromptEncoder, settings: EpisodeSettings
) -> None:
    """Begin one episode, and try the chat template on what it says.

    Args:
        environments: How environments are made, by `Task.env`.
        task: A task.
        encoder: The chat, in tokens.
        settings: Limits and choices.

    Raises:
        ConfigurationError: If there is no such environment, it does not begin, or the template cannot hold several
            turns.
    """
    try:
        factory = environments[task.env]
    except KeyError:
        known = ", ".join(map(repr, environments)) or "none"
        raise ConfigurationError(f"task {task.id!r} asks for environment {task.env!r}, but there are {known}") from None
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
        return await environment.reset()
    finally:
        await environment.close()
