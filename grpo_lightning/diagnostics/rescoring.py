"""Computing the rewards of a few episodes again."""

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from grpo_lightning.diagnostics.checks.scored_again import ScoredAgain
from grpo_lightning.errors import RewardError
from grpo_lightning.rewards.scorer import Scorer
from grpo_lightning.rollout.episode import Episode, Group
from grpo_lightning.rollout.types import Task

EPISODES = 2
"""Of each rollout; more would cost where rewards are slow."""

SLOW = 0.5
"""Seconds of a call after which a reward function is not called again."""

_SEED = 21
_TOLERANCE = 1e-9


class Rescoring:
    """Draws episodes and has the reward functions score them again, but for async and slow ones: judges, mostly.

    Args:
        episodes: How many of each rollout.
    """

    def __init__(self, episodes: int = EPISODES) -> None:
        self._episodes = episodes
        self._draw = random.Random(_SEED)
        self._slow: set[str] = set()

    def score(self, scorer: Scorer, groups: Sequence[Group]) -> ScoredAgain:
        """Compare stored with new rewards.

        Args:
            scorer: The rollout's reward functions.
            groups: The rollout.
        """
        names = [name for name in scorer.plain_names if name not in self._slow]
        episodes = [(g.task, e) for g in groups for e in g.episodes if e.reward is not None]
        found = ScoredAgain()
        if not names:
            return found
        for task, episode in self._draw.sample(episodes, min(self._episodes, len(episodes))):
            stored = {name: episode.rewards.get(name) for name in names}
            again = self._rewards(scorer.raising(), names, task, episode)
            if len(again) < len(names):
                break
            differs = not _equal(stored, again)
            # Only where something differs is it asked whether it always would.
            by_chance = differs and not _equal(again, self._rewards(scorer.raising(), names, task, episode))
            found += ScoredAgain(1, int(differs), int(by_chance))
        return found

    def _rewards(self, scorer: Scorer, names: Sequence[str], task: Task, episode: Episode) -> dict[str, float | None]:
        """Rewards by name, as far as no function was slow or failed."""
        unscored = replace(episode, rewards={}, reward=None)
        rewards: dict[str, float | None] = {}
        for name in names:
            begin = time.perf_counter()
            try:
                rewards |= _run(scorer.only([name]), task, unscored)
            except RewardError:
                self._slow.add(name)
            if time.perf_counter() - begin > SLOW:
                self._slow.add(name)
        return rewards


def _run(scorer: Scorer, task: Task, episode: Episode) -> dict[str, float | None]:
    """A notebook's thread has an event loop already; another thread has none."""
    with ThreadPoolExecutor(1) as thread:
        return dict(thread.submit(lambda: asyncio.run(scorer.score(task, episode))).result().rewards)


def _equal(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> bool:
    return all(_same(a[name], b[name]) for name in a)


def _same(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
