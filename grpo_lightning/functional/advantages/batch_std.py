"""Rewards minus the mean of their group, in units of the spread of the batch."""

from torch import Tensor

from grpo_lightning.functional.advantages.group_std import STD_FLOOR
from grpo_lightning.functional.advantages.judged import Judged
from grpo_lightning.functional.advantages.statistics import (
    BATCH,
    GROUP,
    centred,
    check_floor,
    comparable,
    population_std,
    scaled,
)


def batch_std(judged: Judged, *, std_floor: float = STD_FLOOR) -> Tensor:
    """Lite PPO's advantage: the reward minus the group's mean, over the standard deviation of the batch's rewards.

        A_i = (r_i - mean_group(r)) / (std_batch(r) + std_floor)

    The standard deviation is that of the rewards themselves, differences between prompts included. One scale for all
    groups: it does not blow up where a group's rewards are almost equal.

    Source: Lite PPO, group mean with batch standard deviation, https://arxiv.org/abs/2508.08221
    Peers: TRL (`scale_rewards="batch"`)
    Departs: the population standard deviation; TRL divides by one less than the number of samples. Samples alone in
        their group do not count. The batch is the rollout, of which an optimizer step may see a part.
    Use: with the aggregation ``"token"``, as Lite PPO does; or where rewards have no natural scale but groups should
        keep their differences in size.

    Args:
        judged: The rollout's groups.
        std_floor: Added to the standard deviation, in units of reward.

    Returns:
        Advantages, float64, shape ``[P, G]``, 0 where not valid.

    Raises:
        ValueError: If std_floor is not positive.
    """
    check_floor(std_floor)
    among = comparable(judged.valid_PG)
    std = population_std(centred(judged.rewards_PG, among, BATCH), among, BATCH)
    return scaled(centred(judged.rewards_PG, among, GROUP), std, std_floor)
