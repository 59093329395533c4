"""Rewards minus the mean of their group."""

from torch import Tensor

from grpo_lightning.functional.advantages.judged import Judged
from grpo_lightning.functional.advantages.statistics import GROUP, centred


def group_mean(judged: Judged) -> Tensor:
    """Dr. GRPO's advantage: the reward minus the group's mean, in units of reward.

        A_i = r_i - mean(r)

    Without the division by the standard deviation, prompts that are almost always or almost never solved do not
    count for more than others.

    Source: Dr. GRPO, section 3.2, https://arxiv.org/abs/2503.20783
    Peers: TRL (`scale_rewards="none"`), verl (`grpo` with `norm_adv_by_std_in_grpo=False`)
    Use: together with the aggregation ``"constant"``, for the policy gradient without its two biases. The learning
        rate then depends on the scale of the rewards.

    Args:
        judged: The rollout's groups.

    Returns:
        Advantages, float64, shape ``[P, G]``, 0 where not valid.
    """
    return centred(judged.rewards_PG, judged.valid_PG, GROUP)
