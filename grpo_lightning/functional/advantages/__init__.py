"""Advantage estimators: from the rewards of a rollout's groups to the advantage of each sample."""

from grpo_lightning.functional.advantages.batch_std import batch_std
from grpo_lightning.functional.advantages.gdpo import gdpo
from grpo_lightning.functional.advantages.group_mean import group_mean
from grpo_lightning.functional.advantages.group_std import STD_FLOOR, group_advantages, group_std
from grpo_lightning.functional.advantages.judged import Estimator, Judged
from grpo_lightning.functional.advantages.leave_one_out import leave_one_out
from grpo_lightning.functional.advantages.maxrl import maxrl
from grpo_lightning.functional.advantages.opo import opo
from grpo_lightning.functional.advantages.pass_at_k import pass_at_k
from grpo_lightning.functional.advantages.reinforce_pp import reinforce_pp, reinforce_pp_baseline
from grpo_lightning.functional.advantages.remax import remax

ESTIMATORS: dict[str, Estimator] = {
    "group_std": group_std,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "batch_std": batch_std,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "remax": remax,
    "opo": opo,
    "maxrl": maxrl,
    "gdpo": gdpo,
    "pass_at_k": pass_at_k,
}
"""Every estimator by name, which is that of its function."""

NEEDS_EPISODES = frozenset({"gdpo", "opo", "pass_at_k", "remax"})
"""Estimators that judge whole episodes, by more than one number each or by success."""

__all__ = ["ESTIMATORS", "NEEDS_EPISODES", "STD_FLOOR", "Estimator", "Judged", "group_advantages"]
