"""Estimators of the KL divergence to the reference policy."""

import torch
from torch import Tensor


def kl_k3(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    r"""Schulman's k3: an unbiased, non-negative, per-token estimate of :math:`KL(\pi_\theta\|\pi_{ref})`.

    .. math:: k_3 = e^{\delta} - \delta - 1,\qquad \delta = \log\pi_{ref}(y) - \log\pi_\theta(y)

    Unbiased for tokens sampled from :math:`\pi_\theta`. Source: http://joschu.net/blog/kl-approx.html, used in
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
