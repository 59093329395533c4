"""Trying an environment once before anything expensive starts."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from grpo_lightning.envs.environment import Environment, EnvironmentFactory, Observation
from grpo_lightning.envs.kinds import factory_for
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.continuation import CALL_ID
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.guarded_environment import EnvironmentFault, GuardedEnvironment
from grpo_lightning.rollout.loop import EventLoopThread
from grpo_lightning.rollout.prompts import PromptEncoder
from grpo_lightning.rollout.tool_use import ToolUse
from grpo_lightning.rollout.types import Message, Task
from grpo_lightning.tasks import TaskSource

_LOOKED_AT = 2000


def probe(
    environments: Mapping[str, EnvironmentFactory],
    tasks: TaskSource,
    encoder: PromptEncoder,
    settings: EpisodeSettings,
    has_rewards: bool,
) -> None:
    """Begin one episode of each environment, and try the chat template on what it says.

    Args:
        environments: How environments are made, by `Task.env`.
        tasks: The tasks; the first of each environment is begun, among up to 2,000 that are looked at.
        encoder: The chat, in tokens.
        settings: Limits and choices.
        has_rewards: Whether there are reward functions.

    Raises:
        ConfigurationError: If there is no such environment, it does not begin, begins otherwise the second time, lacks
            the default action that it will be asked for, gives no reward where nothing else does, or the template
            cannot hold several turns.
    """
    # Where there is one environment for all tasks, what they ask for makes no difference.
    looked_at = 1 if isinstance(environments, defaultdict) else min(len(tasks), _LOOKED_AT)
    found: dict[str, Task] = {}
    for i in range(looked_at):
        task = tasks[i * len(tasks) // looked_at]
        found.setdefault(task.env, task)
    factories = [(factory_for(environments, task), task) for task in found.values()]
    for factory, task in factories:
        _probe(factory, task, encoder, settings, has_rewards)


def _probe(
    factory: EnvironmentFactory, task: Task, encoder: PromptEncoder, settings: EpisodeSettings, has_rewards: bool
) -> None:
    loop = EventLoopThread("grpo-lightning-probe")
    try:
        observation, pays = loop.run(_begun(factory, task, settings))
        again, _ = loop.run(_begun(factory, task, settings))
    except EnvironmentFault as fault:
        raise ConfigurationError(str(fault)) from fault
    finally:
        loop.close()
    if (observation.messages, observation.tools) != (again.messages, again.tools):
        raise ConfigurationError(
            f"expected the environment of task {task.id!r} to begin with the same messages each time, but reset() "
            f"first returned {observation.messages!r:.300} and then {again.messages!r:.300}. Advantages compare the "
            "answers to one question: make reset depend on task.seed and task.data alone"
        )
    if not pays and not has_rewards:
        raise ConfigurationError(
            f"expected rewards, but the environment of task {task.id!r} gives none (its reset has reward=None, and it "
            "has no score method), and there is no reward function; set rewards"
        )
    tools = ToolUse.of(observation, encoder)
    opening = tools.opening(observation.messages, encoder)
    encoder.prompt(task.id, opening, tools.for_template)
    if tools.for_template and "split" in (settings.thinking, settings.context_limit):
        try:
            encoder.first((*opening, *_tool_turn(tools.for_template[0])), tools.for_template)
        except ConfigurationError as error:
            raise ConfigurationError(
                "split episodes show the template what the policy said as text, calls of tools too, which this one "
                f"does not take: {error}. Set episodes.thinking='keep' and episodes.context_limit='end'"
            ) from error
    if settings.max_turns > 1:
        encoder.check_turns(tools.for_template, ("user", "tool") if tools.for_template else ("user",))


def _tool_turn(tool: Mapping[str, Any]) -> tuple[Message, ...]:
    """A call as the policy's text and its result, as a split episode shows them to the template anew."""
    name = tool.get("function", tool).get("name", "tool")
    result = {"role": "tool", "name": name, "tool_call_id": CALL_ID, "content": "1"}
    return {"role": "assistant", "content": f"{name}()"}, result


async def _begun(factory: EnvironmentFactory, task: Task, settings: EpisodeSettings) -> tuple[Observation, bool]:
    """The first observation, and whether the environment gives any reward."""
    environment = await GuardedEnvironment.make(factory, task, settings)
    try:
        observation = await environment.reset()
        if settings.invalid_action == "default":
            await environment.default_action()
        scores = type(environment.environment).score is not Environment.score
        return observation, scores or observation.reward is not None
    finally:
        await environment.close()
