"""What an advantage estimator is given.

Shapes: ``P`` prompts (groups), ``G`` samples per prompt, ``K`` single rewards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Estimator = Callable[..., Tensor]
"""``f(judged, **settings) -> advantages_PG``: float64, exactly 0 where a sample is not valid."""

LARGEST = 1e100
"""Rewards beyond this are refused: squares of much larger ones overflow float64, and advantages would silently be 0."""


@dataclass(frozen=True)
class Judged:
    """The rewards of all groups of a rollout, all float64 where not said otherwise.

    Attributes:
        rewards_PG: Weighted sum of the rewards of each sample; anything where not valid.
        valid_PG: Whether the sample has a reward at all, bool.
        lengths_PG: Sampled tokens, int64.
        greedy_P: Reward of the greedy answer to each prompt; NaN where there is none.
        parts_PGK: The single rewards; NaN where one does not apply.
        part_weights_K: Weight of each single reward in the sum.

    Raises:
        ValueError: If shapes disagree or a valid sample's rewards are not finite or beyond `LARGEST`.
    """

    rewards_PG: Tensor
    valid_PG: Tensor
    lengths_PG: Tensor
    greedy_P: Tensor
    parts_PGK: Tensor
    part_weights_K: Tensor

    def __post_init__(self) -> None:
        if self.rewards_PG.ndim != 2:
            raise ValueError(f"expected rewards of shape [P, G], but got {tuple(self.rewards_PG.shape)}")
        prompts, samples = self.rewards_PG.shape
        parts = self.part_weights_K.numel()
        for name, shape in {
            "valid_PG": (prompts, samples),
            "lengths_PG": (prompts, samples),
            "greedy_P": (prompts,),
            "parts_PGK": (prompts, samples, parts),
            "part_weights_K": (parts,),
        }.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"expected {name} of shape {shape}, but got {tuple(getattr(self, name).shape)}")
        rewards, parts_VK = self.rewards_PG[self.valid_PG], self.parts_PGK[self.valid_PG]
        if not torch.isfinite(rewards).all() or parts_VK.isinf().any():
            raise ValueError("expected finite rewards, but got NaN or infinity among the valid samples")
        if (rewards.abs() > LARGEST).any() or (parts_VK.abs() > LARGEST).any():
            raise ValueError(f"expected rewards of at most {LARGEST:g}, but got larger ones among the valid samples")
