"""Advantages of a rollout's turns."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch

from grpo_lightning.functional import group_advantages
from grpo_lightning.rollout.episode import Episode, Group


def with_advantages(groups: Sequence[Group], credit: Literal["episode", "reward_to_go"] = "episode") -> list[Group]:
    """The same groups with their group-relative advantages; episodes without a reward get 0 and count for nothing.

    Args:
        groups: One or more groups.
        credit: ``"episode"`` compares the rewards of whole episodes, and gives all turns of one the same advantage.
            ``"reward_to_go"`` compares, over all turns of the group in which the policy acted, the sum of the rewards
            from that turn on, whatever was given for the whole episode included.
    """
    returns = [[_returns(episode, credit) for episode in group.episodes] for group in groups]
    flat = [[value for episode in group for value in episode] for group in returns]
    width = max([1, *map(len, flat)])
    values = torch.tensor([[v or 0.0 for v in row] + [0.0] * (width - len(row)) for row in flat], dtype=torch.float64)
    valid = torch.tensor([[v is not None for v in row] + [False] * (width - len(row)) for row in flat])
    judged = []
    for group, episodes, row in zip(groups, returns, group_advantages(values, valid).tolist(), strict=True):
        found = iter(row)
        advantages = []
        for episode, judgements in zip(group.episodes, episodes, strict=True):
            mine = [next(found) for _ in judgements]
            advantages.append(tuple(mine * len(episode.turns) if credit == "episode" else mine))
        judged.append(replace(group, advantages=tuple(advantages)))
    return judged


def _returns(episode: Episode, credit: str) -> list[float | None]:
    """What is compared of an episode: its reward, or what each turn still brought; None where there is nothing."""
    if credit == "episode":
        return [episode.reward]
    if episode.reward is None:
        return [None] * len(episode.turns)
    before = accumulate((turn.reward or 0.0 for turn in episode.turns), initial=0.0)
    return [
        None if turn.action.was_forced else episode.reward - earned
        for turn, earned in zip(episode.turns, before, strict=False)
    ]
