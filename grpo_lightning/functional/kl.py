"""Estimators of the KL divergence to the reference policy."""

import torch
from torch import Tensor


def kl_k3(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """Schulman's k3: an unbiased, non-negative, per-token estimate of ``KL(policy || reference)``.

        k3 = exp(delta) - delta - 1,    delta = log reference(y) - log policy(y)

    Unbiased for tokens sampled from the policy. Source: http://joschu.net/blog/kl-approx.html, used in
    DeepSeekMath, equation 4, https://arxiv.org/abs/2402.03300

    Args:
        logprobs_N: Current log-probabilities, shape ``[N]``; gradients flow through them.
        reference_logprobs_N: Reference log-probabilities, shape ``[N]``, no gradient.

    Returns:
        Estimates in nats, shape ``[N]``.

    Raises:
        ValueError: If the shapes differ.
    """
    if logprobs_N.shape != reference_logprobs_N.shape:
        raise ValueError(
            f"expected equal shapes, but got {tuple(logprobs_N.shape)} and {tuple(reference_logprobs_N.shape)}"
        )
    delta = reference_logprobs_N - logprobs_N
    return torch.expm1(delta) - delta
