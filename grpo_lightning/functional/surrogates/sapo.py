"""A soft gate instead of a clip."""

import math

import torch

from grpo_lightning.functional.masked import counted_terms, ratio_where, without_bounds
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss

SATURATED = 40.0  # The sigmoid is 1 and its gradient 0 in float64 from 37 on.


def sapo(terms: PolicyTerms, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> TokenLoss:
    """A smooth gate of the ratio that lets the gradient fade instead of cutting it.

        loss = -f(r) A,    f(r) = 4 / tau sigmoid(tau (r - 1))
        tau = tau_positive where A > 0, else tau_negative

    At ratio 1 the gradient is REINFORCE's. It fades in both directions, at a speed given by tau. No bound cuts it,
    so no token is reported as clipped.

    Source: SAPO, https://arxiv.org/abs/2511.20347
    Peers: TRL (`sapo`: `sapo_temperature_pos`, `sapo_temperature_neg`), verl (`sapo`: `tau_pos`, `tau_neg`)
    Use: when training is unstable with hard clips; a larger ``tau_negative`` fades bad tokens sooner, which are the
        ones that destabilise.

    Args:
        terms: Sampled tokens, see `PolicyTerms`.
        tau_positive: Temperature of good tokens, positive and finite.
        tau_negative: Temperature of the others, positive and finite.

    Returns:
        Loss of each token; nothing is clipped.

    Raises:
        ValueError: If a temperature is out of range or shapes differ.
    """
    for name, tau in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
        if not 0 < tau < math.inf:
            raise ValueError(f"expected {name} > 0 and finite, but got {tau}")
    terms = counted_terms(terms)
    tau_N = torch.full_like(terms.log_ratio, tau_negative).masked_fill(terms.advantages > 0, tau_positive)
    # Beyond, the chain rule would multiply a gradient of 0 by a ratio that may be infinite.
    saturated_N = tau_N * (terms.log_ratio.detach().exp() - 1) > SATURATED
    ratio_N = ratio_where(~saturated_N & (terms.advantages != 0), terms.log_ratio)
    gate_N = torch.where(saturated_N, 1.0, torch.sigmoid(tau_N * (ratio_N - 1))) * 4 / tau_N
    return without_bounds(-(gate_N * terms.advantages))
