"""Advantages in units of their own spread over the batch."""

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


def reinforce_pp(judged: Judged, *, std_floor: float = STD_FLOOR) -> Tensor:
    """REINFORCE++'s advantage: the reward minus the batch's mean, over the batch's standard deviation.

        A_i = (r_i - mean_batch(r)) / (std_batch(r) + std_floor)

    Prompts are compared with each other: a group whose rewards are all equal still pushes, up or down, unless all
    rewards of the batch are equal.

    Source: REINFORCE++, equation 5, https://arxiv.org/abs/2501.03262
    Peers: verl (`reinforce_plus_plus`)
    Departs: no KL penalty inside the reward. Mean and standard deviation count each sample once, the latter over the
        population; verl counts tokens, so that long samples weigh more, and one less in the variance. A sample alone
        in its group gets 0 and does not count: groups of one are not trained on.
    Use: for large batches of prompts that are about equally hard.

    Args:
        judged: The rollout's groups.
        std_floor: Added to the standard deviation, in units of reward.

    Returns:
        Advantages, float64, shape ``[P, G]``, 0 where not valid.

    Raises:
        ValueError: If std_floor is not positive.
    """
    among = comparable(judged.valid_PG)
    return over_batch_std(centred(judged.rewards_PG, among, BATCH), among, std_floor)


def reinforce_pp_baseline(judged: Judged, *, std_floor: float = STD_FLOOR) -> Tensor:
    """REINFORCE++ with baseline: the reward minus the group's mean, over the batch's standard deviation of that.

        d_i = r_i - mean_group(r)
        A_i = d_i / (std_batch(d) + std_floor)

    The differences sum to 0 in each group, and so in the batch: subtracting the mean of the batch once more would add
    nothing but rounding errors, also to groups whose rewards are all equal.

    Source: REINFORCE++ with baseline, equations 6 and 7, https://arxiv.org/abs/2501.03262
    Peers: verl (`reinforce_plus_plus_baseline`)
    Departs: each sample counts once, and the standard deviation is that of the population; verl counts tokens, so that
        long samples weigh more and the mean of the batch is not 0, and one less in the variance. Samples alone in
        their group do not count.
    Use: as `batch_std`, where prompts differ in how hard they are: only differences within groups set the scale.

    Args:
        judged: The rollout's groups.
        std_floor: Added to the standard deviation, in units of reward.

    Returns:
        Advantages, float64, shape ``[P, G]``, 0 where not valid.

    Raises:
        ValueError: If std_floor is not positive.
    """
    among = comparable(judged.valid_PG)
    return over_batch_std(centred(judged.rewards_PG, among, GROUP), among, std_floor)


def over_batch_std(centred_PG: Tensor, among_PG: Tensor, std_floor: float) -> Tensor:
    """Values whose mean over the batch is 0, over their standard deviation there.

    Args:
        centred_PG: The values, 0 where they do not count.
        among_PG: Which samples count.
        std_floor: Added to the standard deviation.

    Returns:
        Advantages, shape ``[P, G]``.

    Raises:
        ValueError: If std_floor is not positive.
    """
    check_floor(std_floor)
    return scaled(centred_PG, population_std(centred_PG, among_PG, BATCH), std_floor)
