"""Rewards minus that of the greedy answer."""

import torch
from torch import Tensor

from grpo_lightning.functional.advantages.judged import Judged
from grpo_lightning.functional.advantages.statistics import comparable


def remax(judged: Judged) -> Tensor:
    """ReMax's advantage: the reward minus that of the greedy answer to the same prompt.

        A_i = r_i - r_greedy

    The baseline costs one more answer per prompt and does not depend on the samples. A group whose rewards are all
    equal still pushes if the greedy answer is better or worse.

    Source: ReMax, the greedy baseline, https://arxiv.org/abs/2310.10505
    Peers: verl (`remax`)
    Departs: a sample alone in its group gets 0, since groups of one are not trained on.
    Use: for few samples per prompt, where the mean of a group is a noisy baseline.

    Args:
        judged: The rollout's groups, with the rewards of greedy answers.

    Returns:
        Advantages, float64, shape ``[P, G]``, 0 where not valid.

    Raises:
        ValueError: If a prompt with valid samples has no finite greedy reward.
    """
    missing = judged.valid_PG.any(1) & ~torch.isfinite(judged.greedy_P)
    if missing.any():
        raise ValueError(
            f"expected the reward of a greedy answer to each of the {len(missing)} prompts, which remax compares with, "
            f"but {int(missing.sum())} have none"
        )
    return torch.where(comparable(judged.valid_PG), judged.rewards_PG - judged.greedy_P[:, None], 0.0)
