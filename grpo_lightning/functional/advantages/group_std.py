"""Rewards in units of the spread of their group.

Shapes: ``P`` prompts (groups), ``G`` samples per prompt.
"""

import torch
from torch import Tensor

from grpo_lightning.functional.advantages.judged import Judged
from grpo_lightning.functional.advantages.statistics import (
    GROUP,
    centred,
    check_floor,
    population_std,
    scaled,
)

STD_FLOOR = 1e-4
"""Added to the group's standard deviation. Rewards closer together than this count as equal."""


def group_advantages(rewards_PG: Tensor, valid_PG: Tensor | None = None, *, std_floor: float = STD_FLOOR) -> Tensor:
    """GRPO's outcome advantage: how much better a sample is than its siblings.

        A_i = (r_i - mean(r)) / (std(r) + std_floor)

    The mean and the population standard deviation run over the valid samples of the group. A group whose
    rewards are all equal gets exactly 0. Source: DeepSeekMath, section 4.1.2, https://arxiv.org/abs/2402.03300

    Args:
        rewards_PG: Rewards, floating, shape ``[P, G]``.
        valid_PG: Bool mask of the samples that take part, shape ``[P, G]``; all of them if omitted.
        std_floor: Added to the standard deviation, in units of reward.

    Returns:
        Advantages, shape ``[P, G]``, dtype of the rewards, 0 where not valid.

    Raises:
        ValueError: If shapes disagree or a valid reward is not finite.
    """
    if rewards_PG.ndim != 2:
        raise ValueError(f"expected rewards of shape [P, G], but got {tuple(rewards_PG.shape)}")
    valid = torch.ones_like(rewards_PG, dtype=torch.bool) if valid_PG is None else valid_PG
    if valid.shape != rewards_PG.shape:
        raise ValueError(f"expected a mask of shape {tuple(rewards_PG.shape)}, but got {tuple(valid.shape)}")
    if not torch.isfinite(rewards_PG[valid]).all():
        raise ValueError("expected finite rewards, but got NaN or infinity among the valid samples")
    differences = centred(rewards_PG, valid, GROUP)
    return scaled(differences, population_std(differences, valid, GROUP), std_floor)


def group_std(judged: Judged, *, std_floor: float = STD_FLOOR) -> Tensor:
    """GRPO's advantage: the reward minus the group's mean, over the group's standard deviation.

        A_i = (r_i - mean(r)) / (std(r) + std_floor)

    Every group in which rewards differ pulls with about the same force, be the differences large or small.

    Source: GRPO, section 4.1.2, https://arxiv.org/abs/2402.03300
    Peers: TRL (`scale_rewards="group"`), verl (`grpo`)
    Departs: the population standard deviation; TRL and verl divide by one less than the number of samples, so that
        their advantages are smaller by the root of (n - 1) / n. std_floor is 1e-4 as in TRL; verl has 1e-6.
    Use: the default. Choose another estimator where very easy and very hard prompts must not count for more than
        their small differences in reward.

    Args:
        judged: The rollout's groups.
        std_floor: Added to the standard deviation, in units of reward.

    Returns:
        Advantages, float64, shape ``[P, G]``, 0 where not valid.

    Raises:
        ValueError: If std_floor is not positive.
    """
    check_floor(std_floor)
    return group_advantages(judged.rewards_PG, judged.valid_PG, std_floor=std_floor)
