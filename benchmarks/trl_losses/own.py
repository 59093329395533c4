"""A surrogate that the project does not have, as a user would write it for ``GRPOModule(surrogate=...)``."""

import math

import torch

from grpo_lightning.functional import PolicyTerms, TokenLoss


def vespo(
    terms: PolicyTerms,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> TokenLoss:
    """VESPO, https://arxiv.org/abs/2602.10693: REINFORCE weighted by a smooth function of the sequence's ratio.

    Its ratio level is ``sequence_product``.
    """
    log_w = terms.log_ratio.detach().clamp(math.log(1e-8), 20.0)
    good = terms.advantages >= 0
    k, rate = torch.where(good, k_positive, k_negative), torch.where(good, lambda_positive, lambda_negative)
    phi = (rate + k * log_w - rate * log_w.exp()).exp()
    nowhere = torch.zeros_like(good)
    return TokenLoss(-phi * terms.advantages * terms.logprobs, nowhere, nowhere)
