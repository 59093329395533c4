"""Estimators of the KL divergence to the reference policy, and the controller of its coefficient.

Where a penalty stands decides what it does: the gradient of an estimate is not an estimate of the gradient. Each
estimator says both for tokens that were sampled from the policy, which the tests prove by summing over a whole
vocabulary. ``p`` is the policy, ``q`` the reference, ``KL(p || q)`` the reverse and ``KL(q || p)`` the forward
divergence.

- *In the loss* the estimate itself is differentiated: ``E[grad k]``.
- *In the reward* it is subtracted as a number, and the policy gradient multiplies it by the score:
  ``E[k grad log p]``.

Both are statements about one token given its prefix. In the loss nothing changes which prefixes are reached; in the
reward that is counted too, if what is subtracted at a token counts in the return of all tokens before it.

Shapes: ``N`` sampled tokens, flat over sequences.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def kl_k1(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """Schulman's k1: the log-ratio itself, an unbiased estimate of ``KL(p || q)`` that can be negative.

        k1 = log p(y) - log q(y)

    In the loss: its gradient is ``grad log p``, whose expectation is exactly zero, so it would add noise alone and is
    not in `IN_LOSS`. In the reward: the unbiased policy gradient of ``KL(p || q)``.

    Source: k1, http://joschu.net/blog/kl-approx.html; both gradients, "Rethinking KL Regularization in RLHF",
        https://arxiv.org/abs/2510.01555, and "A Comedy of Estimators", https://arxiv.org/abs/2512.21852
    Peers: verl (`kl`, `k1`)
    Use: In the reward, as the KL penalty of RLHF.

    Args:
        logprobs_N: Current log-probabilities, shape ``[N]``; gradients flow through them.
        reference_logprobs_N: Reference log-probabilities, shape ``[N]``, no gradient.

    Returns:
        Estimates in nats, shape ``[N]``.

    Raises:
        ValueError: If the shapes differ.
    """
    return _log_ratio(logprobs_N, reference_logprobs_N)


def kl_k2(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """Schulman's k2: half the squared log-ratio, a biased, non-negative estimate of ``KL(p || q)``.

        k2 = (log p(y) - log q(y))^2 / 2

    In the loss: its gradient is ``k1 grad log p``, in expectation exactly the gradient of ``KL(p || q)`` and the same
    as that of k1 in the reward. In the reward: the gradient of ``E_p[k2] - KL(p || q)``, which is only of second order
    in the log-ratio, so it hardly holds a policy that is near its reference.

    Source: k2, http://joschu.net/blog/kl-approx.html; k2 as loss, "Rethinking KL Regularization in RLHF",
        https://arxiv.org/abs/2510.01555
    Peers: verl (`mse`, `k2`)
    Use: In the loss, to keep near the reference in the sense of the reverse KL.

    Args:
        logprobs_N: Current log-probabilities, shape ``[N]``; gradients flow through them.
        reference_logprobs_N: Reference log-probabilities, shape ``[N]``, no gradient.

    Returns:
        Estimates in nats, shape ``[N]``.

    Raises:
        ValueError: If the shapes differ.
    """
    return _log_ratio(logprobs_N, reference_logprobs_N).square() / 2


def kl_k3(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """Schulman's k3: an unbiased, non-negative, per-token estimate of ``KL(p || q)``.

        k3 = exp(delta) - delta - 1,    delta = log q(y) - log p(y)

    In the loss: its gradient is ``(1 - q / p) grad log p``, in expectation exactly the gradient of the forward KL,
    ``KL(q || p)``, though its value estimates the reverse. In the reward: the gradient of ``KL(p || q) - KL(q || p)``,
    which is only of second order in the log-ratio.

    Source: k3, http://joschu.net/blog/kl-approx.html; GRPO, DeepSeekMath, equation 4,
        https://arxiv.org/abs/2402.03300; its bias, "A Comedy of Estimators", https://arxiv.org/abs/2512.21852
    Peers: TRL (`beta` with `use_bias_correction_kl=False`), verl (`low_var_kl`, `k3`)
    Departs: verl cuts delta to [-20, 20] and the estimate to [-10, 10], where the gradient is lost; here nothing is cut
    Use: In the loss, for GRPO as published, and for measuring how far the policy is from its reference.

    Args:
        logprobs_N: Current log-probabilities, shape ``[N]``; gradients flow through them.
        reference_logprobs_N: Reference log-probabilities, shape ``[N]``, no gradient.

    Returns:
        Estimates in nats, shape ``[N]``.

    Raises:
        ValueError: If the shapes differ.
    """
    delta = -_log_ratio(logprobs_N, reference_logprobs_N)
    return torch.expm1(delta) - delta


def kl_abs(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """The absolute log-ratio: no estimate of a KL divergence, but a distance whose gradient never grows.

        abs = |log p(y) - log q(y)|

    In the loss: its gradient is ``sign(p - q) grad log p``, in expectation exactly the gradient of
    ``sum_y |p(y) - q(y)|``, twice the total variation. In the reward: the gradient of ``E_p[abs] - sum_y |p(y) -
    q(y)|``. It has a kink at equality, where the gradient is 0.

    Source: none known; the statements are proved in the tests
    Peers: verl (`abs`)
    Use: In the loss, where single tokens of a large log-ratio must not rule the gradient.

    Args:
        logprobs_N: Current log-probabilities, shape ``[N]``; gradients flow through them.
        reference_logprobs_N: Reference log-probabilities, shape ``[N]``, no gradient.

    Returns:
        Distances in nats, shape ``[N]``.

    Raises:
        ValueError: If the shapes differ.
    """
    return _log_ratio(logprobs_N, reference_logprobs_N).abs()


def adaptive_coefficient(coefficient: float, observed_kl: float, *, target: float, horizon: float) -> float:
    """The next coefficient of the KL penalty, so that the divergence approaches a target.

        coefficient <- coefficient * (1 + clip(observed_kl / target - 1, -0.2, 0.2) / horizon)

    Source: adaptive KL controller, section 2.2, https://arxiv.org/abs/1909.08593; its gain of 0.1 is a horizon of 10
    Peers: verl (`AdaptiveKLController`)
    Departs: verl counts the horizon in samples, this in calls
    Use: When the distance to the reference is known that the policy may take, but not the coefficient for it.

    Args:
        coefficient: The coefficient so far, 0 or more.
        observed_kl: Estimate of the divergence, in nats; as an estimate it may be negative.
        target: Divergence to hold, in nats, above 0, in the same unit (of a token or of a sequence).
        horizon: Calls after which the changes add up to the whole clipped error, 1 or more.

    Returns:
        The next coefficient.

    Raises:
        ValueError: If an argument is out of its range, or ``observed_kl`` is not finite.
    """
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"expected a finite coefficient >= 0, but got {coefficient}")
    if not math.isfinite(observed_kl):
        raise ValueError(f"expected a finite observed_kl, but got {observed_kl}")
    if not 0 < target < math.inf:
        raise ValueError(f"expected a finite target > 0, but got {target}")
    if not 1 <= horizon < math.inf:
        raise ValueError(f"expected a finite horizon >= 1, but got {horizon}")
    error = min(max(observed_kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error / horizon)


def _log_ratio(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    if logprobs_N.shape != reference_logprobs_N.shape:
        raise ValueError(
            f"expected equal shapes, but got {tuple(logprobs_N.shape)} and {tuple(reference_logprobs_N.shape)}"
        )
    return logprobs_N - reference_logprobs_N


KLEstimator = Literal["k1", "k2", "k3", "abs"]
"""Names in `KL_ESTIMATORS`."""

KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
    "abs": kl_abs,
}
"""Estimators by name."""

IN_LOSS = ("k2", "k3", "abs")
"""Estimators whose gradient in the loss pulls to the reference."""

IN_REWARD = ("k1", "k2", "k3", "abs")
"""Estimators that may be subtracted from the reward."""
