"""Rewards minus the mean of the others of their group."""

from torch import Tensor

from grpo_lightning.functional.advantages.judged import Judged
from grpo_lightning.functional.advantages.statistics import GROUP, centred


def leave_one_out(judged: Judged) -> Tensor:
    """RLOO's advantage: the reward minus the mean of the group's other samples.

        A_i = r_i - sum_{j != i} r_j / (n - 1) = n / (n - 1) (r_i - mean(r))

    ``n`` counts the valid samples of the group. The baseline of a sample does not depend on the sample, so that the
    policy gradient has no bias.

    Source: RLOO, the leave-one-out estimator, https://arxiv.org/abs/2402.14740
    Peers: TRL (`RLOOTrainer`), verl (`rloo`)
    Departs: a sample alone in its group gets 0; verl gives it its reward.
    Use: as `group_mean`, where groups are small or of unequal size.

    Args:
        judged: The rollout's groups.

    Returns:
        Advantages, float64, shape ``[P, G]``, 0 where not valid.
    """
    count_P1 = judged.valid_PG.sum(1, keepdim=True)
    others_P1 = (count_P1 - 1).clamp_min(1)
    differences = centred(judged.rewards_PG, judged.valid_PG, GROUP)
    return differences * (count_P1 / others_P1.double())
