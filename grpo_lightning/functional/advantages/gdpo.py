"""Single rewards in units of their own spread, then summed."""

import torch
from torch import Tensor

from grpo_lightning.functional.advantages.group_std import STD_FLOOR, group_advantages
from grpo_lightning.functional.advantages.judged import LARGEST, Judged
from grpo_lightning.functional.advantages.reinforce_pp import over_batch_std
from grpo_lightning.functional.advantages.statistics import check_floor, comparable


def gdpo(judged: Judged, *, std_floor: float = STD_FLOOR) -> Tensor:
    """GDPO's advantage: each reward normalised in its group, then the weighted sum normalised over the batch.

        z_ik = (r_ik - mean_group(r_k)) / (std_group(r_k) + std_floor)
        s_i = sum_k weight_k z_ik
        A_i = s_i / (std_batch(s) + std_floor)

    Different combinations of rewards with the same sum stay different. Where a reward does not apply, it adds nothing
    and counts for nothing. The sums have a mean of 0 in each group, and so in the batch.

    Source: GDPO, the decoupled normalisation, https://arxiv.org/abs/2601.05242
    Peers: TRL (`multi_objective_aggregation="normalize_then_sum"`), verl (`gdpo`)
    Departs: population standard deviations over samples; TRL and verl divide by one less than the number of samples,
        and verl counts tokens over the batch, so that long samples weigh more. Samples alone in their group get 0 and
        do not count.
    Use: for several rewards of different scale or difficulty, none of which should drown another.

    Args:
        judged: The rollout's groups, with single rewards.
        std_floor: Added to each standard deviation.

    Returns:
        Advantages, float64, shape ``[P, G]``, 0 where not valid.

    Raises:
        ValueError: If a valid sample has no single reward or an infinite one, a weight is not finite, or std_floor
            is not positive.
    """
    check_floor(std_floor)
    if not (judged.part_weights_K.abs() <= LARGEST).all():
        raise ValueError(f"expected finite weights of the single rewards, but got {judged.part_weights_K.tolist()}")
    applies_PGK = ~judged.parts_PGK.isnan()
    without = int((judged.valid_PG & ~applies_PGK.any(2)).sum())
    if without:
        raise ValueError(f"expected single rewards of each valid sample, which gdpo compares, but {without} have none")
    among_PG = comparable(judged.valid_PG)
    total_PG = torch.zeros_like(judged.rewards_PG)
    for part, weight in enumerate(judged.part_weights_K):
        mask_PG = judged.valid_PG & applies_PGK[:, :, part]
        total_PG += weight * group_advantages(judged.parts_PGK[:, :, part], mask_PG, std_floor=std_floor)
    return over_batch_std(total_PG, among_PG, std_floor)
