"""Group-relative advantages.

Shapes: ``P`` prompts (groups), ``G`` samples per prompt.
"""

import torch
from torch import Tensor

STD_FLOOR = 1e-4
"""Added to the group's standard deviation. Rewards closer together than this count as equal."""


def group_advantages(rewards_PG: Tensor, valid_PG: Tensor | None = None, *, std_floor: float = STD_FLOOR) -> Tensor:
    """GRPO's outcome advantage: how much better a sample is than its siblings.

        A_i = (r_i - mean(r)) / (std(r) + std_floor)

    The mean and the population standard deviation run over the valid samples of the group. A group whose
    rewards are all equal gets exactly 0. Source: DeepSeekMath, section 4.1.2, https://arxiv.org/abs/2402.03300

    Args:
        rewards_PG: Rewards, floating, shape ``[P, G]``.
        valid_PG: Bool mask of the samples that take part, shape ``[P, G]``; all of them if omitted.
        std_floor: Added to the standard deviation, in units of reward.

    Returns:
        Advantages, shape ``[P, G]``, dtype of the rewards, 0 where not valid.

    Raises:
        ValueError: If shapes disagree or a valid reward is not finite.
    """
    if rewards_PG.ndim != 2:
        raise ValueError(f"expected rewards of shape [P, G], but got {tuple(rewards_PG.shape)}")
    valid = torch.ones_like(rewards_PG, dtype=torch.bool) if valid_PG is None else valid_PG
    if valid.shape != rewards_PG.shape:
        raise ValueError(f"expected a mask of shape {tuple(rewards_PG.shape)}, but got {tuple(valid.shape)}")
    if not torch.isfinite(rewards_PG[valid]).all():
        raise ValueError("expected finite rewards, but got NaN or infinity among the valid samples")
    rewards = torch.where(valid, rewards_PG, 0.0)
    count = valid.sum(1, keepdim=True).clamp_min(1)
    centred = torch.where(valid, rewards - rewards.sum(1, keepdim=True) / count, 0.0)
    # Equal rewards can differ from their own mean by a rounding error, which the floor would blow up.
    spread = rewards.masked_fill(~valid, -torch.inf).amax(1, keepdim=True) > rewards.masked_fill(
        ~valid, torch.inf
    ).amin(1, keepdim=True)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(spread, centred / (std + std_floor), torch.zeros_like(centred))
