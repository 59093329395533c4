"""REINFORCE weighted by a smooth function of the ratio."""

import math

import torch

from grpo_lightning.functional.masked import counted_terms, refuse_infinite, without_bounds
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss

SMALLEST, LARGEST = math.log(1e-8), 20.0  # Beyond these log-ratios the weight is 0 in float32.


def vespo(
    terms: PolicyTerms,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> TokenLoss:
    """REINFORCE with a constant weight that is 1 at ratio 1 and fades smoothly on both sides, faster where it is bad.

        loss = -phi(w) A log policy(y),    phi(w) = w^k exp(lambda (1 - w)),    w = sg[r]
        k, lambda = k_positive, lambda_positive where A >= 0, else k_negative, lambda_negative

    ``sg`` stops the gradient. The paper's ``w`` is the ratio of the whole sequence, ``ratio_level: sequence_product``.

    Source: VESPO, https://arxiv.org/abs/2602.10693
    Peers: TRL (`vespo`: `vespo_k_pos`, `vespo_lambda_pos`, `vespo_k_neg`, `vespo_lambda_neg`)
    Use: with stale rollouts, where the ratios of whole sequences spread widely and a hard clip would drop most of them.

    Args:
        terms: Sampled tokens, see `PolicyTerms`.
        k_positive: How fast the weight of good tokens falls below ratio 1, 0 or more.
        lambda_positive: How fast it falls above, 0 or more.
        k_negative: The same below ratio 1 for bad tokens.
        lambda_negative: The same above.

    Returns:
        Loss of each token; nothing is clipped.

    Raises:
        ValueError: If an argument is out of range, shapes differ or a log-probability is infinite where the weight is
            not 0.
    """
    settings = {
        "k_positive": k_positive,
        "lambda_positive": lambda_positive,
        "k_negative": k_negative,
        "lambda_negative": lambda_negative,
    }
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"expected {name} >= 0 and finite, but got {value}")
    terms = counted_terms(terms)
    refuse_infinite("logprobs where the weight is not 0", terms.logprobs)
    log_w_N, good_N = terms.log_ratio.detach().clamp(SMALLEST, LARGEST), terms.advantages >= 0
    k_N = torch.full_like(log_w_N, k_negative).masked_fill(good_N, k_positive)
    lambda_N = torch.full_like(log_w_N, lambda_negative).masked_fill(good_N, lambda_positive)
    phi_N = (k_N * log_w_N + lambda_N * (1 - log_w_N.exp())).exp()
    return without_bounds(-(phi_N * terms.advantages * terms.logprobs))
