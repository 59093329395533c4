"""A rollout whose engine dies on the way."""

import logging

import pytest
from fakes import FakeChat, FakeEngine, make_task, random_generation
from games import Echo

from grpo_lightning.errors import EngineDiedError
from grpo_lightning.rewards import Scorer
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.sampler import Sampler

TASKS = [make_task(f"t{i}") for i in range(4)]


class Mortal(FakeEngine):
    """Dies after a number of requests of each life, or when it is synced.

    Args:
        lives: Requests of each life; no limit for None.
    """

    def __init__(self, *lives):
        super().__init__()
        self._lives = list(lives)
        self.begin()

    def begin(self):
        self.version, self.left = -1, self._lives.pop(0)
        self.start(EngineSpec("none", 8, 100, 100))

    @property
    def policy_version(self):
        return self.version

    def sync(self):
        if self.left == 0:
            raise EngineDiedError("it was killed")
        self.version = 3

    async def generate(self, prompt_ids, params, *, seed=None, **settings):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise EngineDiedError("it was killed")
        return random_generation(prompt_ids, params, seed, self.version)

    def restart(self):
        self.close()
        self.begin()


def sample(engine, restarts=1):
    sampler = Sampler(
        engine, FakeChat(), {"": Echo}, EpisodeSettings(), 500, 6, (), (), 0, restarts, engine.sync, engine.restart
    )
    try:
        return sampler.sample("Rollout 0", TASKS, Scorer([]), samples=3, temperature=1.0, key=0, trainer_bar=None)
    finally:
        engine.close()


def test_an_engine_that_dies_is_started_again_and_nothing_is_lost(caplog):
    whole = sample(Mortal(None))
    with caplog.at_level(logging.WARNING):
        assert sample(Mortal(14, None)) == whole
    [message] = [r.getMessage() for r in caplog.records if "died" in r.getMessage()]
    assert message.startswith("Rollout 0: the engine died and is started again. Of 12 episodes ")
    assert "finished and kept; played again: t" in message
    assert message.endswith("it was killed")


def test_finished_episodes_are_kept():
    engine = Mortal(14, None)
    asked = []
    generate = engine.generate

    async def counted(*args, **settings):
        asked.append(engine.left)
        return await generate(*args, **settings)

    engine.generate = counted
    sample(engine)
    # What was asked of the second engine is what the first had not finished.
    assert 0 < sum(left is None for left in asked) < 12 * 4


def test_it_may_die_more_often_only_if_it_is_allowed_to():
    with pytest.raises(EngineDiedError, match="it was killed"):
        sample(Mortal(5, 5, None))
    assert len(sample(Mortal(5, 5, None), restarts=2)) == 4
    with pytest.raises(EngineDiedError):
        sample(Mortal(5, None), restarts=0)


def test_one_that_died_since_the_last_rollout_is_started_again():
    engine = Mortal(0, None)
    engine.version = 2
    assert len(sample(engine)) == 4


def test_one_that_never_came_up_is_not():
    with pytest.raises(EngineDiedError):
        sample(Mortal(0, None))
