"""Rewards relative to the mean of their group."""

import torch
from torch import Tensor

from grpo_lightning.functional.advantages.judged import Judged
from grpo_lightning.functional.advantages.statistics import GROUP, centred, mean


def maxrl(judged: Judged) -> Tensor:
    """MaxRL's advantage: the reward minus the group's mean, over the group's mean.

        A_i = (r_i - mean(r)) / mean(r)

    For rewards of 0 and 1 this approaches the gradient of the log-likelihood of a correct answer as the samples per
    prompt grow: one correct answer among n gets n - 1, a wrong one -1. A group without any reward gets 0.

    Source: MaxRL, the estimator from samples, https://arxiv.org/abs/2602.02710
    Peers: none known
    Departs: nothing is added to the mean; a group whose mean is 0 gets 0 instead.
    Use: for rewards of 0 and 1 and hard prompts, which count for more the more rarely they are solved.

    Args:
        judged: The rollout's groups, with rewards of 0 or more.

    Returns:
        Advantages, float64, shape ``[P, G]``, 0 where not valid.

    Raises:
        ValueError: If a valid reward is negative.
    """
    rewards = judged.rewards_PG[judged.valid_PG]
    if (rewards < 0).any():
        raise ValueError(f"expected rewards >= 0, which maxrl needs, but got {rewards.min().item():g}")
    mean_P1 = mean(judged.rewards_PG, judged.valid_PG, GROUP)
    differences = centred(judged.rewards_PG, judged.valid_PG, GROUP)
    return torch.where(mean_P1 > 0, differences / mean_P1, 0.0)
