"""The clipped policy-gradient surrogate.

Shapes: ``N`` sampled tokens of a batch, flat over sequences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """What the surrogate computed, all over the same ``N`` tokens.

    Attributes:
        loss: Scalar to minimise: ``sum(weight * token_loss)``.
        log_ratio: The log-ratio that the loss used, before clipping, detached, shape ``[N]``.
        clipped_low: Where the lower clip binds (negative advantage, ratio below), bool, shape ``[N]``.
        clipped_high: Where the upper clip binds (positive advantage, ratio above), bool, shape ``[N]``.
    """

    loss: Tensor
    log_ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def clipped_surrogate(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    weight_N: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PolicyLoss:
    """PPO's clipped surrogate with separate lower and upper clips.

        loss = sum_t w_t * -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
        r_t = policy(y_t) / old_policy(y_t)

    The aggregation lies in the weights: ``w = 1 / (sequences * length of its sequence)`` is GRPO,
    ``w = 1 / tokens`` is DAPO. Sources: PPO, equation 7, https://arxiv.org/abs/1707.06347; GRPO, equation 3,
    https://arxiv.org/abs/2402.03300; separate clips, DAPO, equation 8, https://arxiv.org/abs/2503.14476

    Args:
        logprobs_N: Log-probabilities under the current policy, with gradient, shape ``[N]``.
        old_logprobs_N: Log-probabilities stored when the tokens were sampled, without gradient, shape ``[N]``.
        advantages_N: Advantage of each token, shape ``[N]``.
        weight_N: Weight of each token in the sum, shape ``[N]``; 0 removes a token.
        clip_low: How far below 1 the ratio may fall, in [0, 1).
        clip_high: How far above 1 the ratio may rise, 0 or more.

    Returns:
        The loss and what the detectors need to see of it.

    Raises:
        ValueError: If shapes differ, or ``old_logprobs_N`` carries a gradient: the gradient of the ratio
            would then cancel and nothing would be learned.
    """
    shapes = {tuple(t.shape) for t in (logprobs_N, old_logprobs_N, advantages_N, weight_N)}
    if len(shapes) != 1:
        raise ValueError(f"expected four tensors of one shape [N], but got shapes {sorted(shapes)}")
    if old_logprobs_N.requires_grad:
        raise ValueError("expected old logprobs without gradient, but they require grad: detach them")
    if not 0 <= clip_low < 1 or not clip_high >= 0:
        raise ValueError(f"expected 0 <= clip_low < 1 and clip_high >= 0, but got {clip_low} and {clip_high}")
    log_ratio = logprobs_N - old_logprobs_N
    with torch.no_grad():
        clipped_low = (log_ratio.exp() < 1 - clip_low) & (advantages_N < 0)
        clipped_high = (log_ratio.exp() > 1 + clip_high) & (advantages_N > 0)
        constant = clipped_low | clipped_high | (advantages_N == 0) | (weight_N == 0)
    # The minimum, written so that a ratio that overflows where it has no say gives no NaN (0 times infinity).
    ratio = torch.where(constant, 0.0, log_ratio).exp()
    ratio = torch.where(clipped_low, 1 - clip_low, torch.where(clipped_high, 1 + clip_high, ratio))
    loss = -(weight_N * ratio * advantages_N).sum()
    return PolicyLoss(loss, log_ratio.detach(), clipped_low, clipped_high)
