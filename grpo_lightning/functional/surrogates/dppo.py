"""A trust region of probabilities instead of ratios."""

from typing import Literal, get_args

import torch
from torch import Tensor

from grpo_lightning.functional.masked import counted_terms, ratio_where
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss

Divergence = Literal["tv", "kl"]
"""Total variation or KL divergence, both between "this token" and "any other token"."""


def dppo(terms: PolicyTerms, *, divergence: Divergence = "tv", threshold: float = 0.15) -> TokenLoss:
    """The unclipped ratio, without the tokens whose probability has moved too far and would move on.

        loss = 0 where D > threshold and (A > 0 and r > 1, or A < 0 and r < 1), else -r A
        tv: D = |p - p_old|
        kl: D = p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))

    A ratio is a poor measure of how far a policy has moved: a rare token can have a large one that changes little, a
    frequent token a small one that changes much. The divergence sees the sampled token and all others as one event
    each (the paper's binary approximation). Ratios must be of the level ``token``: the old probability is computed
    from them.

    Source: DPPO, objective and binary divergences, https://arxiv.org/abs/2602.04879
    Peers: verl (`dppo_tv`, `dppo_kl`)
    Departs: verl truncates the ratio (at 20 by default, its example sets 10000) and has a threshold for each direction.
    Use: when PPO clips rare tokens too early, or frequent ones too late. verl's example takes 0.15 for ``"tv"`` and
        0.05 for ``"kl"``.

    Args:
        terms: Sampled tokens, see `PolicyTerms`, with log-ratios of the level ``token``.
        divergence: ``"tv"`` or ``"kl"``, the latter in nats from the old policy to the current one.
        threshold: Largest divergence that keeps the gradient, 0 or more.

    Returns:
        Loss of each token and where the trust region removes its gradient.

    Raises:
        ValueError: If an argument is out of range or shapes differ.
    """
    if divergence not in get_args(Divergence):
        raise ValueError(f"expected divergence of {get_args(Divergence)}, but got {divergence!r}")
    if not threshold >= 0:
        raise ValueError(f"expected threshold >= 0, but got {threshold}")
    terms = counted_terms(terms)
    with torch.no_grad():
        # Rounding can lift a log-probability near 0 above it. An impossible token (-inf) gives NaN, which is not
        # beyond the threshold; its ratio of 0 has no gradient anyway.
        old_N = (terms.logprobs - terms.log_ratio).clamp(max=0)
        measure = binary_tv if divergence == "tv" else binary_kl
        beyond_N = measure(old_N, terms.logprobs.clamp(max=0)) > threshold
        low_N = beyond_N & (terms.advantages < 0) & (terms.log_ratio < 0)
        high_N = beyond_N & (terms.advantages > 0) & (terms.log_ratio > 0)
    free_N = ~low_N & ~high_N & (terms.advantages != 0)
    ratio_N = ratio_where(free_N, terms.log_ratio)
    return TokenLoss(torch.where(free_N, -(ratio_N * terms.advantages), 0.0), low_N, high_N)


def binary_tv(old_logprobs_N: Tensor, logprobs_N: Tensor) -> Tensor:
    """Total variation between "this token or another" under the old and the current policy."""
    return (logprobs_N.exp() - old_logprobs_N.exp()).abs()


def binary_kl(old_logprobs_N: Tensor, logprobs_N: Tensor) -> Tensor:
    """KL divergence in nats of "this token or another" from the old policy to the current one."""
    this_N, other_N = old_logprobs_N.exp(), -torch.expm1(old_logprobs_N)
    this_part_N = torch.where(this_N == 0, 0.0, this_N * (old_logprobs_N - logprobs_N))
    other_part_N = other_N * (other_N.log() - (-torch.expm1(logprobs_N)).log())
    return this_part_N + torch.where(other_N == 0, 0.0, other_part_N)
