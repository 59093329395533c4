"""Rewards minus the mean per token of their group."""

import torch
from torch import Tensor

from grpo_lightning.functional.advantages.judged import Judged
from grpo_lightning.functional.advantages.statistics import GROUP, centred


def opo(judged: Judged) -> Tensor:
    """OPO's advantage: the reward minus the group's mean in which each sample counts by its length.

        A_i = r_i - sum_j length_j r_j / sum_j length_j

    The baseline of the smallest variance if each token adds about as much to the squared norm of the gradient, so
    that a long sample adds more. Advantages of a group do not sum to 0, but those of its tokens do.

    Source: OPO, the length-weighted baseline, https://arxiv.org/abs/2505.23585
    Peers: verl (`opo`)
    Departs: a sample alone in its group gets 0; verl gives it its reward. A group without any sampled token gets 0.
    Use: with one optimizer step per rollout, as OPO is strictly on-policy, and an aggregation that does not divide by
        the length of the sequence.

    Args:
        judged: The rollout's groups, with lengths.

    Returns:
        Advantages, float64, shape ``[P, G]``, 0 where not valid.

    Raises:
        ValueError: If a valid sample has a negative length.
    """
    if (judged.lengths_PG[judged.valid_PG] < 0).any():
        raise ValueError(f"expected lengths >= 0, but got {int(judged.lengths_PG[judged.valid_PG].min())}")
    lengths = torch.where(judged.valid_PG, judged.lengths_PG, 0).double()
    total_P1 = lengths.sum(1, keepdim=True)
    # The baseline of differences from the mean is that of the rewards minus the mean, and exactly 0 for equal rewards.
    differences = centred(judged.rewards_PG, judged.valid_PG, GROUP)
    baseline_P1 = (lengths * differences).sum(1, keepdim=True) / total_P1.clamp_min(1)
    return torch.where(judged.valid_PG & (total_P1 > 0), differences - baseline_P1, 0.0)
