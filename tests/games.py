"""Small environments for the tests."""

import asyncio
import random

from fakes import FakeChat, FakeEngine

from grpo_lightning.envs import Environment, InvalidAction, Observation
from grpo_lightning.rewards import Scorer
from grpo_lightning.rollout.collector import collect
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.player import Player
from grpo_lightning.rollout.types import SamplingSettings

SAMPLING = SamplingSettings(max_tokens=6, temperature=0.9, stop_token_ids=(1,))


def user(text):
    return ({"role": "user", "content": text},)


class Echo(Environment):
    """Repeats what was said; ends after a number of turns that the task's seed draws.

    Args:
        turns: Turns of every episode; drawn from 1 to 4 if omitted.
    """

    opened = 0

    def __init__(self, turns=None):
        self.turns = turns
        self.taken = 0
        self.closed = 0

    async def reset(self, task):
        self.task = task
        self.left = self.turns or random.Random(task.seed).randint(1, 4)
        return Observation(user(f"{task.id}?"))

    async def step(self, action):
        self.taken += 1
        self.left -= 1
        return Observation(
            user(f"{self.taken}:{action.text}"),
            reward=float(self.taken),
            terminated=self.left == 0,
            info={"left": self.left},
        )

    async def close(self):
        self.closed += 1


class Delayed(Echo):
    """Echo that takes its time, a random one."""

    async def step(self, action):
        await asyncio.sleep(random.uniform(0, 0.01))
        return await super().step(action)


class Picky(Echo):
    """Echo that reads only what begins with a letter of the first half of the alphabet."""

    async def step(self, action):
        if not action.text[:1] or action.text[0] > "m":
            raise InvalidAction("Say a letter up to m.", reward=-1.0)
        return await super().step(action)

    def default_action(self):
        return "a default"


def player(
    engine, environment=None, *, scorer=None, max_context=4000, chat=None, sampling=SAMPLING, kind=Player, **settings
):
    """A player of one kind of environment."""
    return kind(
        engine,
        chat or FakeChat(),
        sampling,
        scorer or Scorer([]),
        EpisodeSettings(**settings),
        max_context,
        {"": environment},
        "0/0",
    )


def play(tasks, environment, *, generation=None, samples=3, finished=None, on_episode=lambda episode: None, **settings):
    """Collect groups with a fake engine; returns them and the engine."""
    engine = FakeEngine(*([generation] if generation else []))
    engine.start(EngineSpec("none", 8, 100, 100))
    try:
        coroutine = collect(
            player(engine, environment, **settings),
            tasks,
            samples_per_task=samples,
            finished=finished,
            on_episode=on_episode,
        )
        return engine.run(asyncio.wait_for(coroutine, timeout=60)), engine
    finally:
        engine.close()
