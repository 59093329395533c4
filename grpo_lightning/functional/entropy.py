"""Control of the policy's entropy: the coefficient of a bonus, and the tokens where it decides.

The entropies themselves come from `functional.token_logprobs`.

Shapes: ``N`` sampled tokens, flat over sequences.
"""

import math

import torch
from torch import Tensor


def adaptive_entropy_coefficient(
    coefficient: float, observed: float, *, target: float, step: float, low: float = 0.0, high: float = 1.0
) -> float:
    """The next coefficient of the entropy bonus, a step up or down, so that the entropy stays above a target.

        coefficient <- clip(coefficient + step, low, high)    if observed <= target
                       clip(coefficient - step, low, high)    otherwise

    The coefficient is the memory of the controller; what stands in the loss is `active_entropy_coefficient` of it.

    Source: adaptive entropy control, Skywork-OR1, section 3.3, https://arxiv.org/abs/2505.22312
    Peers: TRL (`use_adaptive_entropy`)
    Departs: Skywork-OR1's released code steps down at equality; TRL and this step up
    Use: Against a collapse of the entropy, where no fixed coefficient fits the whole run. Set the target near the
        entropy of the first steps.

    Args:
        coefficient: The coefficient so far; one outside the bounds is brought back.
        observed: Mean entropy of the step's tokens, in nats per token.
        target: Entropy below which the coefficient rises, in nats per token, 0 or more.
        step: Change of the coefficient at each call, above 0.
        low: Smallest coefficient, 0 or more.
        high: Largest coefficient, ``low`` or more.

    Returns:
        The next coefficient.

    Raises:
        ValueError: If an argument is not finite or out of its range.
    """
    _check_entropies(coefficient, observed, target)
    if not 0 < step < math.inf:
        raise ValueError(f"expected a finite step > 0, but got {step}")
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"expected finite 0 <= low <= high, but got low {low} and high {high}")
    return min(max(coefficient + (step if observed <= target else -step), low), high)


def active_entropy_coefficient(coefficient: float, observed: float, *, target: float) -> float:
    """What stands in the loss of an adaptive coefficient: nothing while the entropy is above its target.

        alpha = coefficient if observed <= target else 0

    Source: adaptive entropy control, Skywork-OR1, section 3.3, https://arxiv.org/abs/2505.22312
    Peers: TRL (`use_adaptive_entropy`)
    Departs: Skywork-OR1's released code gives 0 at equality
    Use: With `adaptive_entropy_coefficient`, from the entropy of the step before.

    Args:
        coefficient: The coefficient of the controller, finite.
        observed: Mean entropy of the last step's tokens, in nats per token.
        target: Entropy that the bonus defends, in nats per token, 0 or more.

    Returns:
        The coefficient of the loss's ``-alpha * entropy``.

    Raises:
        ValueError: If an argument is not finite or the target is negative.
    """
    _check_entropies(coefficient, observed, target)
    return coefficient if observed <= target else 0.0


def high_entropy_marks(entropy_N: Tensor, weight_N: Tensor, *, share: float = 0.2) -> Tensor:
    """Marks the tokens of highest entropy, where the policy is undecided: about the given share of those that count.

        marked = entropy >= the k-th highest entropy,    k = 1 + floor(share * (n - 1))

    ``n`` tokens count. This ``k`` is what the linearly interpolated quantile of ``1 - share`` leaves at or above it, so
    share 1 marks all and any share at least one. Tokens that tie with the k-th are all marked, so that more than ``k``
    can be, and the order of the tokens has no say.

    Source: Beyond the 80/20 Rule, https://arxiv.org/abs/2506.01939, where the share is 0.2
    Peers: TRL (`top_entropy_quantile`)
    Departs: TRL takes the quantile over a micro-batch of all processes, and a share of 0 for the highest alone; here
        whoever calls gives the tokens to choose among, which should be those of the whole optimizer step
    Use: To restrict the policy gradient to tokens where a decision is made. Weights are not raised to make up for the
        others.

    Args:
        entropy_N: Entropy of each token's distribution, in nats, shape ``[N]``.
        weight_N: Weight of each token in the loss, shape ``[N]``; 0 where it does not count.
        share: Share of the counted tokens to mark, above 0 and at most 1.

    Returns:
        Marks, bool, shape ``[N]``; none where the weight is 0.

    Raises:
        ValueError: If the shapes differ, the share is out of its range, or the entropy of a counted token is NaN.
    """
    if entropy_N.shape != weight_N.shape:
        raise ValueError(f"expected equal shapes, but got {tuple(entropy_N.shape)} and {tuple(weight_N.shape)}")
    if not 0 < share <= 1:
        raise ValueError(f"expected a share in (0, 1], but got {share}")
    counted = weight_N != 0
    entropies = entropy_N.detach()[counted]
    if entropies.isnan().any():
        raise ValueError("expected entropies, but got NaN for a token that counts")
    if not len(entropies):
        return counted
    # A share like 0.29 of 100 must not fall to 28 because of its rounding.
    k = 1 + math.floor(share * (len(entropies) - 1) + 1e-9)
    threshold = torch.topk(entropies, k).values[-1]
    return counted & (entropy_N.detach() >= threshold)


def _check_entropies(coefficient: float, observed: float, target: float) -> None:
    if not math.isfinite(coefficient):
        raise ValueError(f"expected a finite coefficient, but got {coefficient}")
    if not math.isfinite(observed):
        raise ValueError(f"expected a finite observed entropy, but got {observed}")
    if not 0 <= target < math.inf:
        raise ValueError(f"expected a finite target >= 0, but got {target}")
