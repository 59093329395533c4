"""Advantages of samples of which one out of k is enough."""

import math

import torch
from torch import Tensor

from grpo_lightning.functional.advantages.judged import Judged


def pass_at_k(judged: Judged, *, k: int, success_reward: float = 1.0) -> Tensor:
    """Pass@k training: the mean advantage of the sets of k samples that hold a sample, where one success is enough.

        fail = C(w, k) / C(n, k),    std = sqrt(fail (1 - fail))
        A_right = fail / std
        A_wrong = (fail - C(w - 1, k - 1) / C(n - 1, k - 1)) / std

    ``n`` valid samples of a group, ``w`` of them wrong; ``fail`` is the share of the sets of k that hold no right one.
    All is 0 where every set succeeds or every set fails: with fewer than k wrong samples there is nothing to gain.

    Source: Pass@k Training, section 2.4, https://arxiv.org/abs/2508.10751
    Peers: none known
    Departs: rewards count as success or failure by a threshold. A group with fewer than two valid samples gets 0.
    Use: to keep exploring: prompts that are solved often enough count for nothing, hard ones for more. k = 1 is
        `group_std` of successes, without a floor.

    Args:
        judged: The rollout's groups.
        k: How many samples share one success, from 1 to the valid samples of every group.
        success_reward: Smallest reward of a sample that succeeded.

    Returns:
        Advantages, float64, shape ``[P, G]``, 0 where not valid.

    Raises:
        ValueError: If k is below 1 or above the valid samples of a group, or success_reward is not finite.
    """
    if k < 1 or not math.isfinite(success_reward):
        raise ValueError(f"expected k >= 1 and a finite success_reward, but got {k} and {success_reward}")
    right_PG = judged.valid_PG & (judged.rewards_PG >= success_reward)
    advantages = torch.zeros_like(judged.rewards_PG)
    counts = zip(judged.valid_PG.sum(1).tolist(), right_PG.sum(1).tolist(), strict=True)
    for group, (valid, right) in enumerate(counts):
        if valid >= 2:
            of_right, of_wrong = _of_group(valid, valid - right, k)
            advantages[group] = of_wrong
            advantages[group, right_PG[group]] = of_right
    return torch.where(judged.valid_PG, advantages, 0.0)


def _of_group(valid: int, wrong: int, k: int) -> tuple[float, float]:
    """Advantages of a right and of a wrong sample."""
    if k > valid:
        raise ValueError(f"expected at least k = {k} valid samples in each group, but a group has {valid}")
    # Whole numbers up to the division, so that large groups lose nothing.
    fail = math.comb(wrong, k) / math.comb(valid, k)
    std = math.sqrt(fail * (1 - fail))
    if std == 0:
        return 0.0, 0.0
    return fail / std, (fail - math.comb(wrong - 1, k - 1) / math.comb(valid - 1, k - 1)) / std
