"""Advantages of a rollout's turns."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal, Self

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional.advantages import ESTIMATORS, NEEDS_EPISODES, Judged
from grpo_lightning.named import configured, named
from grpo_lightning.rollout.episode import Episode, Group
from grpo_lightning.rollout.ledger import Source

Estimate = Callable[[Judged], Tensor]
"""An estimator with its settings."""

_Rows = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Advantages:
    """How a run makes advantages.

    Attributes:
        estimate: The estimator with its settings.
        name: Its name.
    """

    estimate: Estimate
    name: str

    @classmethod
    def from_settings(cls, estimator: str | Callable[..., Tensor], settings: Mapping[str, Any], credit: str) -> Self:
        """From what `RolloutDataModule` is given.

        Args:
            estimator: Name in `ESTIMATORS`, import path, or the function itself.
            settings: Its settings.
            credit: As in `with_advantages`.

        Raises:
            ConfigurationError: If the name is unknown, or a setting is not one of the function or out of its range.
        """
        function = named("advantage", estimator, ESTIMATORS)
        estimate = configured("advantage", function, settings, _example())
        name = _name(estimate)
        if credit == "reward_to_go" and name in NEEDS_EPISODES:
            raise ConfigurationError(
                f"advantage {name!r} judges whole episodes: expected episodes.advantage 'episode', but got {credit!r}"
            )
        return cls(estimate, name)

    @property
    def plain(self) -> bool:
        """Whether they are GRPO's, as the paper has them."""
        return self.name == "group_std" and not getattr(self.estimate, "keywords", {})

    @property
    def needs_greedy(self) -> bool:
        """Whether it compares with the greedy answer."""
        return self.name == "remax"


def _example() -> Judged:
    """Two groups on which settings are tried."""
    rewards = torch.tensor([[0.0, 1.0] * 8] * 2, dtype=torch.float64)
    return Judged(
        rewards_PG=rewards,
        valid_PG=torch.ones_like(rewards, dtype=torch.bool),
        lengths_PG=torch.ones_like(rewards, dtype=torch.int64),
        greedy_P=rewards[:, 0],
        parts_PGK=rewards[..., None],
        part_weights_K=torch.ones(1, dtype=torch.float64),
    )


def with_advantages(
    groups: Sequence[Group],
    credit: Literal["episode", "reward_to_go"] = "episode",
    estimator: Estimate = ESTIMATORS["group_std"],
    *,
    part_weights: Mapping[str, float] | None = None,
) -> list[Group]:
    """The same groups with their advantages; episodes without a reward get 0 and count for nothing.

    Args:
        groups: One or more groups.
        credit: ``"episode"`` compares the rewards of whole episodes, and gives all turns of one the same advantage.
            ``"reward_to_go"`` compares, over all turns of the group in which the policy acted, the sum of the rewards
            from that turn on, whatever was given for the whole episode included.
        estimator: From what is compared to advantages: one of `ESTIMATORS`, its settings bound.
        part_weights: Weight of each single reward by name; 1 where it has none.

    Raises:
        ValueError: If ``"reward_to_go"`` is to be judged by an estimator that needs whole episodes.
    """
    whole = credit == "episode"
    if not whole and (name := _name(estimator)) in NEEDS_EPISODES:
        raise ValueError(
            f"expected an estimator that compares rewards alone, which credit 'reward_to_go' needs, but got {name!r}; "
            "choose credit 'episode'"
        )
    returns = [[_returns(episode, credit) for episode in group.episodes] for group in groups]
    judged = judge(
        [[value for episode in group for value in episode] for group in returns],
        [group.episodes for group in groups] if whole else [()] * len(groups),
        part_weights or {},
        [group.greedy for group in groups],
    )
    found = []
    for group, episodes, row in zip(groups, returns, estimated(judged, estimator).tolist(), strict=True):
        values = iter(row)
        advantages = []
        for episode, judgements in zip(group.episodes, episodes, strict=True):
            mine = [next(values) for _ in judgements]
            advantages.append(tuple(mine * len(episode.turns) if whole else mine))
        found.append(replace(group, advantages=tuple(advantages)))
    return found


def judge(
    rewards: _Rows, episodes: Sequence[Sequence[Episode]], part_weights: Mapping[str, float], greedy: Sequence[Any]
) -> Judged:
    """Lay out what is compared, one row per group.

    Args:
        rewards: What is compared; None where there is nothing.
        episodes: The episodes that these are the rewards of; none where they are those of turns.
        part_weights: Weight of each single reward by name; 1 where it has none.
        greedy: Reward of each greedy answer or None.
    """
    width = max([1, *map(len, rewards)])
    names = list(dict.fromkeys(name for group in episodes for episode in group for name in episode.rewards))
    parts = [_table([[e.rewards.get(name) for e in group] for group in episodes], width, math.nan) for name in names]
    return Judged(
        rewards_PG=_table(rewards, width, 0.0),
        valid_PG=torch.tensor([[v is not None for v in row] + [False] * (width - len(row)) for row in rewards]),
        lengths_PG=_table([[e.count(Source.SAMPLED) for e in group] for group in episodes], width, 0).long(),
        greedy_P=torch.tensor([math.nan if v is None else v for v in greedy], dtype=torch.float64),
        parts_PGK=torch.stack(parts, 2) if parts else torch.zeros(len(rewards), width, 0, dtype=torch.float64),
        part_weights_K=torch.tensor([part_weights.get(name, 1.0) for name in names], dtype=torch.float64),
    )


def estimated(judged: Judged, estimator: Estimate) -> Tensor:
    """Advantages that keep the promise of an estimator.

    Raises:
        ValueError: If they have another shape, are not finite, or not 0 where a sample is not valid.
    """
    advantages = estimator(judged)
    if advantages.shape != judged.valid_PG.shape:
        raise ValueError(
            f"expected advantages of shape {tuple(judged.valid_PG.shape)} from {_name(estimator)!r}, but got "
            f"{tuple(advantages.shape)}"
        )
    if not torch.isfinite(advantages).all() or (advantages[~judged.valid_PG] != 0).any():
        raise ValueError(
            f"expected finite advantages from {_name(estimator)!r}, 0 without a reward, but got other values"
        )
    return advantages


def _name(estimator: Estimate) -> str:
    """Name of an estimator, whatever settings are bound to it."""
    bare: Any = estimator
    while isinstance(bare, partial):
        bare = bare.func
    return getattr(bare, "__name__", type(bare).__name__)


def _table(rows: _Rows, width: int, missing: float) -> Tensor:
    """Rows of unequal length as one table, filled up."""
    filled = [[missing if v is None else v for v in row] + [missing] * (width - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.float64)


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
