"""What a surrogate is given, and what it gives back.

Shapes: ``N`` sampled tokens of a micro-batch, flat over its sequences.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PolicyTerms:
    """The sampled tokens of a micro-batch as a surrogate sees them.

    Attributes:
        logprobs: Log-probabilities under the current policy, with gradient, shape ``[N]``.
        log_ratio: Log-ratio to the old policy at the chosen level (`functional.ratio`), with gradient, shape ``[N]``.
            Tokens of one sequence have the same value where the level is a sequence's.
        advantages: Advantage of each token, without gradient, shape ``[N]``.
        weight: Weight of each token in the loss of the optimizer step, shape ``[N]``; 0 where it does not count, and
            whatever a token of weight 0 holds, NaN included, must not reach loss or gradient.
        sequence: Sequence of each token, int64 in ``0 .. S - 1``, shape ``[N]``.
        marked: Tokens that were chosen for the whole optimizer step before its first micro-batch (`functional.marks`),
            bool, shape ``[N]``.
    """

    logprobs: Tensor
    log_ratio: Tensor
    advantages: Tensor
    weight: Tensor
    sequence: Tensor
    marked: Tensor


@dataclass(frozen=True)
class TokenLoss:
    """What a surrogate computed.

    Attributes:
        loss: Loss of each token, before its weight, with gradient, shape ``[N]``. The loss of the step is
            ``sum(weight * loss)``.
        clipped_low: Where a bound for small ratios removes the gradient, bool, shape ``[N]``.
        clipped_high: Where a bound for large ratios removes the gradient, bool, shape ``[N]``.
    """

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
