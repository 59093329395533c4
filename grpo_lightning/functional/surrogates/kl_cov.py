"""The unclipped ratio with a penalty on the tokens that lower the entropy most."""

import math

import torch

from grpo_lightning.functional.masked import counted_terms, ratio_where, refuse_infinite, without_bounds
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss


def kl_cov(terms: PolicyTerms, *, kl_cov_coef: float = 1.0) -> TokenLoss:
    """The ratio times the advantage, unclipped, with marked tokens penalised for moving away from the old policy.

        loss = -r A + kl_cov_coef |log r| where marked, else -r A

    The marks are those of `kl_cov_marks`. At ratio 1 the penalty has no gradient, so nothing changes at the first
    update after sampling. No gradient is removed, so no token is reported as clipped.

    Source: KL-Cov, https://arxiv.org/abs/2505.22617
    Peers: verl (`kl_cov`: `ppo_kl_coef`)
    Departs: the paper writes a KL divergence to the old policy; its released code and verl take the absolute log-ratio
        of the sampled token, and so does this. verl's configuration has 0.1 as coefficient, the paper 1.
    Use: against collapsing entropy, with several updates per batch of samples.

    Args:
        terms: Sampled tokens, see `PolicyTerms`.
        kl_cov_coef: Coefficient of the penalty, 0 or more, finite.

    Returns:
        Loss of each token; nothing is clipped.

    Raises:
        ValueError: If the coefficient is out of range, shapes differ or the log-ratio of a marked token is infinite
            where the weight is not 0.
    """
    if not 0 <= kl_cov_coef < math.inf:
        raise ValueError(f"expected kl_cov_coef >= 0 and finite, but got {kl_cov_coef}")
    terms = counted_terms(terms)
    marked_N = torch.where(terms.marked, terms.log_ratio, 0.0)
    refuse_infinite("log-ratios of marked tokens where the weight is not 0", marked_N.detach())
    ratio_N = ratio_where(terms.advantages != 0, terms.log_ratio)
    return without_bounds(-(ratio_N * terms.advantages) + kl_cov_coef * marked_N.abs())
