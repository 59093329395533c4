"""Rewards: plain callables from a completion to a number, and how several are combined."""

from grpo_lightning.rewards.answers import last_number_correct
from grpo_lightning.rewards.reasoning_gym import ReasoningGymReward
from grpo_lightning.rewards.scorer import RewardFunction, Scorer
from grpo_lightning.rewards.trl import TRLReward

__all__ = ["ReasoningGymReward", "RewardFunction", "Scorer", "TRLReward", "last_number_correct"]
